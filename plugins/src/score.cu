// Scores of all candidates of all sparse decode items, as float16 numbers that order them, for up to 10 planes.
//
// A score is a sum of L look-ups, one a hash table, and what bounds it is shared memory.  The table (score_tables.cuh)
// lies so that a hash table is a bank, and the 32 lanes of a warp always look at 32 different hash tables: no two meet,
// whatever the codes.  A look-up fetches four bytes that serve up to four query heads of a KV head.
//
// Tensor cores add them up.  The four lanes of a quad look up the same tokens in different hash tables; as the left
// operand of a matrix product of bytes, a lane's words are four tokens' rows, and a right operand of zeros and ones
// adds the quad's bytes head by head, exactly, in 32 bits.  So a look-up costs little more than its address and its
// load.
//
// Warps work alone.  Each has a ring of stages in shared memory, a stage being the codes of a unit of tokens in 32 hash
// tables, filled by asynchronous copies of 16 bytes whatever the page size.  Rows of a stage are rotated by pieces of
// 16 bytes so that the lanes of a load find their pieces in different banks.
#include "device.cuh"
#include "launchers.h"
#include "score_pass.cuh"

namespace socket_trt {
namespace {

constexpr int kMaxWarps = 16;

// What a block scores: an item, and which of the parts that its tokens are split into.
struct Share {
    int item, part, parts;
};

// Every sparse item has one of the `slots` blocks (for each set of heads), and of the others what its length deserves.
// All lanes of a warp must call it; item < 0: nothing to do.
__device__ Share find_share(const Arguments& a, int slots, int slot) {
    const int lane = threadIdx.x & 31;
    const auto weight_of = [&](int i) -> uint32_t {
        if (i >= a.items) return 0;
        const Item item = read_item(a, i);
        return item.mode == kItemSparse ? max(1, Candidates(a, item.length).count() / kScoreUnit) : 0;
    };
    uint32_t total = 0, items = 0;
    for (int base = 0; base < a.items; base += 32) {
        const uint32_t weight = weight_of(base + lane);
        total += __reduce_add_sync(~0u, weight);
        items += __popc(__ballot_sync(~0u, weight > 0));
    }
    const uint64_t others = slots - items;
    uint32_t before = 0;
    for (int base = 0; base < a.items; base += 32) {
        const uint32_t weight = weight_of(base + lane);
        const uint32_t parts = weight > 0 ? 1 + static_cast<uint32_t>(others * weight / total) : 0;
        const uint32_t until = before + inclusive_warp_sum(parts);
        const uint32_t mine = __ballot_sync(~0u, until > static_cast<uint32_t>(slot));
        if (mine) {
            const int owner = __ffs(mine) - 1;
            const int owned = __shfl_sync(~0u, parts, owner), end = __shfl_sync(~0u, until, owner);
            return Share{base + owner, slot - (end - owned), owned};
        }
        before = __shfl_sync(~0u, until, 31);
    }
    return Share{-1, 0, 1};
}

template <int TOKENS>
__device__ __forceinline__ void store_keys(uint16_t* to, const uint32_t (&key)[TOKENS / 2]) {
    if constexpr (TOKENS == 8) {
        *reinterpret_cast<uint4*>(to) = make_uint4(key[0], key[1], key[2], key[3]);
    } else {
        *reinterpret_cast<uint2*>(to) = make_uint2(key[0], key[1]);
    }
}

template <int CODE_BYTES, int COLUMNS, int PACKING>
__global__ __launch_bounds__(kMaxWarps * 32, 1) void score_kernel(const __grid_constant__ Arguments a,
                                                                  const __grid_constant__ ScorePlan plan) {
    using L = Layout<CODE_BYTES, COLUMNS>;
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int kv_head = blockIdx.x / plan.head_blocks, head_block = blockIdx.x % plan.head_blocks;

    // What is done before the wait looks at nothing that the append kernel writes: its items are found anew, and codes
    // are copied that this step's tokens are not among.
    const Share share = find_share(a, gridDim.y, blockIdx.y);
    if (share.item < 0) return;
    const Item item = read_item(a, share.item);
    const Candidates candidates(a, item.length);
    if (candidates.count() <= attended_budget(a, item.length)) return;  // all of them are attended
    const int begin = candidates.begin();
    const int units = (candidates.last - begin + L::kUnit - 1) / L::kUnit,
              each = (units + share.parts - 1) / share.parts;
    const int first_unit = share.part * each, last_unit = min(units, first_unit + each);
    if (first_unit >= last_unit) return;

    // Where things lie.
    const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    if (base < kSystemShared || base > kSystemShared + kStaticShared) __trap();
    const Places<CODE_BYTES, COLUMNS> places{base, warps * kStages};
    const uint32_t table = places.table();
    uint32_t stage[kStages];
#pragma unroll
    for (int s = 0; s < kStages; s++) stage[s] = places.stage(warp * kStages + s);

    const QuadSum quad;
    const bool by_kv_head = a.select_heads == a.p.kv_heads;
    Heads heads{0, a.group};
    if (PACKING != kOneSum) heads = Heads{head_block * PACKING, min(PACKING, a.group - head_block * PACKING)};
    const int64_t lane_index =
        (static_cast<int64_t>(share.item) * a.p.kv_heads + kv_head) * plan.head_blocks + head_block;
    const float* probability =
        a.probability +
        (static_cast<int64_t>(share.item) * a.p.query_heads + kv_head * a.group) * a.p.planes_per_table * a.p.tables;
    const int own_token = lane_token<CODE_BYTES, COLUMNS>();
    uint32_t* partial =
        static_cast<uint32_t*>(a.score_partial) + (lane_index * a.key_stride + begin) * 2 + lane * (2 * L::kProducts);

    for (int pass = 0; pass < plan.passes; pass++) {
        const int first_table = pass * COLUMNS, tables = min(COLUMNS, a.p.tables - first_table);
        const bool last_pass = pass == plan.passes - 1;
        Walk<CODE_BYTES, COLUMNS> walk(a, item.row, kv_head, begin, first_unit + warp, last_unit, warps, first_table,
                                       tables, stage);
        int copied = 0;
        while (copied < kStages && (pass > 0 || walk.end() <= item.length - a.p.tokens)) walk.copy(), copied++;
        if (pass == 0) {
            wait_for_previous_kernel();
        } else {
            __syncthreads();  // all warps are done with the last table
        }
        for (; copied < kStages; copied++) walk.copy();
        build_table<CODE_BYTES, COLUMNS, PACKING>(
            a, probability, heads, first_table,
            *reinterpret_cast<Sides<CODE_BYTES, COLUMNS>*>(shared + (places.sides() - base)), shared + (table - base));

        uint32_t own_stage[kStages];
#pragma unroll
        for (int s = 0; s < kStages; s++) own_stage[s] = lane_stage(stage[s]);
        int norm_page = walk.load_page(first_unit + warp, g);
        for (int unit = first_unit + warp; unit < last_unit; unit += warps) {
            const int at = begin + unit * L::kUnit + own_token;
            Norms<L::kOwnTokens> norms;
            norms.load(a, walk.checked(norm_page), kv_head, at);
            norm_page = walk.load_page(unit + warps, g);
            int32_t sum[L::kProducts][4] = {};
            uint32_t* unit_partial = partial + unit * (2 * L::kUnit);
            if (pass > 0) {
#pragma unroll
                for (int m = 0; m < L::kProducts; m++) {
                    const uint2 x = *reinterpret_cast<const uint2*>(unit_partial + 2 * m);
                    sum[m][0] = x.x & 0xffff, sum[m][1] = x.x >> 16, sum[m][2] = x.y & 0xffff, sum[m][3] = x.y >> 16;
                }
            }
            look_up_unit(sum, walk, own_stage, lane_entries(table), tables, quad);
            if (!last_pass) {
#pragma unroll
                for (int m = 0; m < L::kProducts; m++) {
                    *reinterpret_cast<uint2*>(unit_partial + 2 * m) =
                        make_uint2(sum[m][0] | sum[m][1] << 16, sum[m][2] | sum[m][3] << 16);
                }
                continue;
            }
            using H = LaneHeads<PACKING>;
            uint32_t key[H::kCount][L::kOwnTokens / 2];
            make_keys<CODE_BYTES, COLUMNS, PACKING>(key, sum, norms, a.p.dtype == SOCKET_TRT_FLOAT16);
#pragma unroll
            for (int i = 0; i < H::kCount; i++) {
                if (!H::exists(i, heads.count)) continue;
                const int h = H::head(i);
                const int selecting = by_kv_head ? kv_head : kv_head * a.group + heads.first + h;
                const int64_t row = static_cast<int64_t>(share.item) * a.select_heads + selecting;
                store_keys<L::kOwnTokens>(a.score_key + row * a.key_stride + at, key[i]);
                // The sample: of each kSampleTokens the first of one lane, another in every unit.
                constexpr int kQuads = kSampleTokens / L::kQuadTokens;
                if ((g & (kQuads - 1)) == (unit * 3 & (kQuads - 1)) && t >> 1 == (unit >> 2 & 1)) {
                    a.sample_key[row * (a.key_stride / kSampleTokens) + at / kSampleTokens] =
                        static_cast<uint16_t>(key[i][0]);
                }
            }
        }
    }
}

using ScoreKernel = void (*)(Arguments, ScorePlan);

template <int CODE_BYTES, int COLUMNS>
bool try_plan(const Arguments& a, const Device& device, ScorePlan& plan) {
    for (int warps = kMaxWarps; warps >= 4; warps -= 2) {
        plan.shared_memory = Places<CODE_BYTES, COLUMNS>{kSystemShared, warps * kStages}.end() - kSystemShared;
        if (plan.shared_memory + kStaticShared > device.shared_memory) continue;
        plan.warps = warps;
        plan.columns = COLUMNS;
        plan.passes = (a.p.tables + COLUMNS - 1) / COLUMNS;
        return true;
    }
    return false;
}

template <int CODE_BYTES, int COLUMNS>
ScoreKernel kernel_for(int packing) {
    return packing == kFourHeads  ? score_kernel<CODE_BYTES, COLUMNS, kFourHeads>
           : packing == kTwoHeads ? score_kernel<CODE_BYTES, COLUMNS, kTwoHeads>
                                  : score_kernel<CODE_BYTES, COLUMNS, kOneSum>;
}

}  // namespace

ScorePlan plan_score(const Arguments& a, const Device& device) {
    ScorePlan plan{};
    const bool by_kv_head = a.select_heads == a.p.kv_heads;
    plan.packing = by_kv_head || a.group == 1 ? kOneSum : a.group == 2 ? kTwoHeads : kFourHeads;
    plan.head_blocks = plan.packing == kFourHeads ? (a.group + 3) / 4 : 1;
    const bool fits = a.p.planes_per_table <= 8 ? try_plan<1, 64>(a, device, plan) || try_plan<1, 32>(a, device, plan)
                      : a.p.planes_per_table <= 10 ? try_plan<2, 32>(a, device, plan)
                                                   : false;
    if (!fits) return plan_score_wide(a);
    // One block fills a multiprocessor: as many parts of an item as leave the fewest multiprocessors idle.
    const int64_t lanes = static_cast<int64_t>(a.items) * a.p.kv_heads * plan.head_blocks;
    const int units = (a.max_length + kScoreUnit - 1) / kScoreUnit;
    double best = 1e30;
    int best_parts = 1;
    for (int parts = 1; parts <= device.multiprocessors && parts <= units; parts++) {
        const int64_t waves = (lanes * parts + device.multiprocessors - 1) / device.multiprocessors;
        // In tokens' time: the tokens of a part, and what starting a block costs.
        const double time = waves * (static_cast<double>(a.max_length) / parts + 3072.0 * plan.passes);
        if (time < best * 0.999) {
            best = time;
            best_parts = parts;
        }
    }
    plan.slots = a.items * best_parts;
    plan.partial_bytes = plan.passes > 1 ? lanes * a.key_stride * 8 : 0;
    return plan;
}

cudaError_t launch_score(const Arguments& a, const ScorePlan& plan, cudaStream_t stream) {
    if (plan.columns == 0) return launch_score_wide(a, plan, stream);
    const ScoreKernel kernel = a.code_bytes == 2    ? kernel_for<2, 32>(plan.packing)
                               : plan.columns == 64 ? kernel_for<1, 64>(plan.packing)
                                                    : kernel_for<1, 32>(plan.packing);
    const cudaError_t status = set_up(kernel, plan.shared_memory);
    if (status != cudaSuccess) return status;
    Launch launch(dim3(a.p.kv_heads * plan.head_blocks, plan.slots), dim3(plan.warps * 32), plan.shared_memory, stream);
    return launch.overlapped(a.overlapped)(kernel, a, plan);
}

}  // namespace socket_trt
