// Scores for more planes than the look-up tables of score.cu take, or for GPUs with too little shared memory for them.
//
// Plain rather than fast: a hash table is the product of two half-tables (low byte and high byte of the code), 32 hash
// tables of one query head are looked up in one pass, and passes add up in the workspace.
#include "device.cuh"
#include "launchers.h"

namespace socket_trt {
namespace {

constexpr int kThreads = 512;
constexpr int kTables = 32;
constexpr int kHalf = 256;     // entries of a half-table
constexpr int kTokens = 8192;  // tokens of a block

// The probability that `planes` planes, of which p[stride * r] is the r-th one's positive side, give `code`.
__device__ float product(const float* p, int planes, int stride, int code) {
    float x = 1.f;
    for (int r = 0; r < planes; r++) {
        const float positive = __ldg(p + r * stride);
        x *= code >> (planes - 1 - r) & 1 ? positive : 1.f - positive;
    }
    return x;
}

__global__ __launch_bounds__(kThreads) void score_wide_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ float half_tables[];  // [kTables, 2, kHalf]
    wait_for_previous_kernel();
    const Item item = a.item[blockIdx.z];
    if (item.mode != kItemSparse) return;
    const Candidates candidates(a, item.length);
    if (candidates.count() <= attended_budget(a, item.length)) return;  // all of them are attended
    const int begin = candidates.begin() + blockIdx.x * kTokens, end = min(candidates.last, begin + kTokens);
    if (begin >= end) return;

    const int heads = a.p.query_heads / a.select_heads, first_head = blockIdx.y * heads;
    const int kv_head = first_head / a.group, rank = a.p.planes_per_table, tables = a.p.tables;
    const int low_planes = min(rank, 8), high_planes = rank - low_planes;
    const int64_t row_index = static_cast<int64_t>(blockIdx.z) * a.select_heads + blockIdx.y;
    float* partial = static_cast<float*>(a.score_partial) + row_index * a.key_stride;
    uint16_t* keys = a.score_key + row_index * a.key_stride;
    uint16_t* samples = a.sample_key + row_index * (a.key_stride / kSampleTokens);
    // Scores only order the tokens of their own head: this keeps even the largest inside float16.
    const float scale = exp2f(static_cast<float>(rank) * 0.5f) / (heads * tables);

    for (int head = 0; head < heads; head++) {
        const float* probability =
            a.probability + (static_cast<int64_t>(blockIdx.z) * a.p.query_heads + first_head + head) * rank * tables;
        for (int first = 0; first < tables; first += kTables) {
            const int count = min(kTables, tables - first);
            const bool first_pass = head == 0 && first == 0;
            const bool last_pass = head == heads - 1 && first + count == tables;
            __syncthreads();
            for (int i = threadIdx.x; i < count * 2 * kHalf; i += kThreads) {
                const int table = i / (2 * kHalf), code = i % kHalf;
                const bool low = i / kHalf % 2 == 0;
                const float* p = probability + first + table;
                half_tables[i] = low ? product(p + high_planes * tables, low_planes, tables, code)
                                     : product(p, high_planes, tables, code);
            }
            __syncthreads();
            for (int at = begin + threadIdx.x; at < end; at += kThreads) {
                const int place = at & (a.p.page_size - 1);
                const int64_t page_head = static_cast<int64_t>(read_page(a, item.row, at)) * a.p.kv_heads + kv_head;
                const int64_t code_at = ((page_head * tables + first) << a.page_shift) + place;
                float sum = first_pass ? 0.f : partial[at];
                for (int table = 0; table < count; table++) {
                    const int64_t to = code_at + (static_cast<int64_t>(table) << a.page_shift);
                    const int code = a.code_bytes == 1 ? static_cast<const uint8_t*>(a.p.code_cache)[to]
                                                       : static_cast<const uint16_t*>(a.p.code_cache)[to];
                    const float* own = half_tables + table * 2 * kHalf;
                    sum += own[code & (kHalf - 1)] * own[kHalf + (code >> 8)];
                }
                if (!last_pass) {
                    partial[at] = sum;
                    continue;
                }
                const int64_t norm_at = (page_head << a.page_shift) + place;
                const float norm = a.p.dtype == SOCKET_TRT_FLOAT16
                                       ? to_float(static_cast<const __half*>(a.p.norm_cache)[norm_at])
                                       : to_float(static_cast<const __nv_bfloat16*>(a.p.norm_cache)[norm_at]);
                const uint16_t key = __half_as_ushort(__float2half_rn(fmaxf(fminf(sum * norm * scale, 65504.f), 0.f)));
                keys[at] = key;
                const int block = at / kSampleTokens;
                if (at % kSampleTokens == block * 37 % kSampleTokens) samples[block] = key;
            }
        }
    }
}

}  // namespace

ScorePlan plan_score_wide(const Arguments& a) {
    ScorePlan plan{};
    plan.shared_memory = kTables * 2 * kHalf * sizeof(float);
    plan.partial_bytes = static_cast<int64_t>(a.items) * a.select_heads * a.key_stride * sizeof(float);
    return plan;
}

cudaError_t launch_score_wide(const Arguments& a, const ScorePlan& plan, cudaStream_t stream) {
    const cudaError_t status = set_up(score_wide_kernel, plan.shared_memory);
    if (status != cudaSuccess) return status;
    const int blocks = (a.max_length + kTokens - 1) / kTokens + 1;
    Launch launch(dim3(blocks, a.select_heads, a.items), dim3(kThreads), plan.shared_memory, stream);
    return launch.overlapped(a.overlapped)(score_wide_kernel, a);
}

}  // namespace socket_trt
