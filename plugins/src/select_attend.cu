// Selection and attention in one kernel, where every query head selects for itself and clusters of blocks exist
// (compute capability 9.0 on): the blocks that found a head's list attend to equal parts of it, without waiting for the
// other heads' lists, and combine what they found through their shared memory.
//
// A row of keys or values is read by 8, 16 or 32 lanes, 16 bytes each.  With one query head for each token there is
// nothing to share: a lane copies its pieces to a ring of its own in shared memory, from which it alone takes them, and
// no thread waits for another.
#include <cstddef>

#include "select.cuh"

namespace socket_trt {
namespace {

using select::kThreads;
using select::kWarps;

constexpr int kPieces = 2;  // that a lane takes of keys, and of values, in one step
constexpr int kStages = 3;  // steps in the ring
constexpr int kStageBytes = kThreads * 2 * kPieces * 16, kRingBytes = kStages * kStageBytes;
constexpr size_t kRings = offsetof(select::Shared, coarse);  // where they begin
constexpr float kLog2E = 1.4426950408889634f;

// How a warp reads rows of SIZE elements of two bytes.
template <int SIZE>
struct Rows {
    static constexpr int kPiecesEach = SIZE / 8;
    static constexpr int kLanes = kPiecesEach <= 8 ? 8 : kPiecesEach <= 16 ? 16 : 32;
    static constexpr int kAtOnce = 32 / kLanes;
    static constexpr int kStep = kPieces * kAtOnce;  // tokens
};

// What lanes that share rows have attended to: eight elements of the output each.
struct Attended {
    float maximum = -INFINITY, sum = 0.f, output[8] = {};

    // Express all in terms of a maximum that is not below the present one.
    __device__ __forceinline__ void rescale(float to) {
        const float factor = maximum == -INFINITY ? 0.f : exp2f(maximum - to);
        maximum = to;
        sum *= factor;
#pragma unroll
        for (float& x : output) x *= factor;
    }
};

template <typename T>
__device__ __forceinline__ void unpack_piece(const uint4& piece, float (&x)[8]) {
    const uint32_t pair[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 two = unpack<T>(pair[i]);
        x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
}

// Copies a warp's rows, from the slots [begin, end) of a list, step by step into its lanes' rings.
template <int SIZE>
class Copies {
    using R = Rows<SIZE>;

  public:
    __device__ Copies(const Arguments& a, int kv_head, const int32_t* slots, int begin, int end, uint32_t ring)
        : a_(a), slots_(slots), kv_head_(kv_head), at_(begin), end_(end), ring_(ring) {
        // A lane beyond the row's end copies the last piece, and gives it no weight.
        const int piece = min(static_cast<int>(threadIdx.x) % R::kLanes, R::kPiecesEach - 1);
        keys_ = static_cast<const uint4*>(a.p.key_cache) + piece;
        values_ = static_cast<const uint4*>(a.p.value_cache) + piece;
    }

    // Start to copy the next step to its place in the ring: keys, then values.
    __device__ __forceinline__ void copy(int stage) {
        if (at_ < end_) {
            const uint32_t to = ring_ + stage * kStageBytes;
#pragma unroll
            for (int i = 0; i < kPieces; i++) {
                // Behind the last slot it is taken again, so that no copy depends on a condition.
                const int slot = slots_[min(at_ + i * R::kAtOnce + lane_row(), end_ - 1)];
                const int64_t row = cache_index(a_, slot, kv_head_) * R::kPiecesEach;
                copy_16_bytes(to + i * (kThreads * 16), keys_ + row, cache_policy_);
                copy_16_bytes(to + (kPieces + i) * (kThreads * 16), values_ + row, cache_policy_);
            }
            at_ += R::kStep;
        }
        commit_copies();
    }

  private:
    static __device__ __forceinline__ int lane_row() { return (threadIdx.x & 31) / R::kLanes; }

    const Arguments& a_;
    uint64_t cache_policy_ = read_once_policy();
    const uint4 *keys_, *values_;
    const int32_t* slots_;
    int kv_head_, at_, end_;
    uint32_t ring_;
};

// One warp's attention to the slots [begin, end) of the list of the query in row `query_row`.  meanwhile(): what to do
// while the first rows come.  CAPPED: with softcap, which few models have; the others' loop is shorter without it.
template <typename T, int SIZE, bool CAPPED, typename Meanwhile>
__device__ Attended attend(const Arguments& a, int64_t query_row, int kv_head, const int32_t* slots, int begin, int end,
                           char* shared, Meanwhile meanwhile) {
    using R = Rows<SIZE>;
    const int lane = threadIdx.x & 31, piece = lane % R::kLanes, group = lane / R::kLanes;
    const uint32_t ring = shared_address(shared) + threadIdx.x * 16;
    Copies<SIZE> copies(a, kv_head, slots, begin, end, ring);
#pragma unroll
    for (int stage = 0; stage < kStages; stage++) copies.copy(stage);
    meanwhile();

    float query[8] = {};
    if (piece < R::kPiecesEach) {
        unpack_piece<T>(__ldg(static_cast<const uint4*>(a.p.query) + query_row * R::kPiecesEach + piece), query);
    }
    const float scale = CAPPED ? a.p.scale : a.p.scale * kLog2E;
#pragma unroll
    for (float& x : query) x *= scale;

    Attended own;
    int stage = 0;
    for (int at = begin; at < end; at += R::kStep) {
        wait_for_copies<kStages - 1>();
        const uint32_t from = ring + stage * kStageBytes;
        float score[kPieces], maximum = own.maximum;
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            float x[8], sum = 0.f;
            unpack_piece<T>(load_piece(from + i * (kThreads * 16)), x);
#pragma unroll
            for (int d = 0; d < 8; d++) sum = fmaf(query[d], x[d], sum);
#pragma unroll
            for (int step = 1; step < R::kLanes; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if (CAPPED) sum = a.p.softcap * tanhf(sum / a.p.softcap) * kLog2E;
            score[i] = at + i * R::kAtOnce + group < end ? sum : -INFINITY;
            maximum = fmaxf(maximum, score[i]);
        }
        if (maximum != -INFINITY) {  // else these lanes have had no token yet
            own.rescale(maximum);
#pragma unroll
            for (int i = 0; i < kPieces; i++) {
                float x[8];
                unpack_piece<T>(load_piece(from + (kPieces + i) * (kThreads * 16)), x);
                const float weight = exp2f(score[i] - maximum);
                own.sum += weight;
#pragma unroll
                for (int d = 0; d < 8; d++) own.output[d] = fmaf(weight, x[d], own.output[d]);
            }
        }
        copies.copy(stage);
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    wait_for_copies<0>();
    // The lanes of the other rows.
#pragma unroll
    for (int step = R::kLanes; step < 32; step *= 2) {
        own.rescale(fmaxf(own.maximum, __shfl_xor_sync(~0u, own.maximum, step)));
        own.sum += __shfl_xor_sync(~0u, own.sum, step);
#pragma unroll
        for (float& x : own.output) x += __shfl_xor_sync(~0u, x, step);
    }
    return own;
}

// Partial results in shared memory, one of each warp or of each block.
template <int SIZE, int COUNT>
struct Partial {
    float maximum[COUNT], sum[COUNT], output[COUNT][SIZE];

    // The weighted sum of the first `count` ones' element d.
    __device__ __forceinline__ float3 combine(int count, int d) const {
        float most = -INFINITY, total = 0.f, result = 0.f;
#pragma unroll
        for (int i = 0; i < count; i++) most = fmaxf(most, maximum[i]);
#pragma unroll
        for (int i = 0; i < count; i++) {
            const float factor = maximum[i] == -INFINITY ? 0.f : exp2f(maximum[i] - most);
            total = fmaf(factor, sum[i], total);
            result = fmaf(factor, output[i][d], result);
        }
        return make_float3(most, total, result);
    }
};

template <typename T, int SIZE, bool CAPPED>
__global__ __launch_bounds__(kThreads, 2) void select_attend_kernel(const __grid_constant__ Arguments a) {
    using R = Rows<SIZE>;
    extern __shared__ __align__(16) char dynamic[];
    select::Shared& shared = *reinterpret_cast<select::Shared*>(dynamic);
    const int blocks = gridDim.x, block = blockIdx.x;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, d = threadIdx.x;
    constexpr uint32_t kPartialBytes = sizeof(Partial<SIZE, 1>);
    select::select_head<R::kStep>(
        a, shared, blocks * kPartialBytes, [&](const Item& item, int64_t index, const auto& list) {
            __syncthreads();  // nobody looks any more at what the rings come to lie over
            list.channel.wait(0);
            const int share = list.part / kWarps, begin = min(list.own, warp * share),
                      end = min(list.own, begin + share);
            const int64_t query =
                static_cast<int64_t>(blockIdx.y) * a.p.tokens + item.token;  // its row, and the output's
            const Attended own =
                attend<T, SIZE, CAPPED>(a, query, blockIdx.y / a.group, list.slots, begin, end, dynamic + kRings, [&] {
                    for (int i = d; i < list.own; i += kThreads) {  // for whoever asks what was selected
                        a.slot[index * a.list_stride + block * list.part + i] = list.slots[i];
                    }
                });

            // The warps' results lie where the rings were, the blocks' in the first block.
            auto& of_warps = *reinterpret_cast<Partial<SIZE, kWarps>*>(dynamic + kRings);
            auto& of_blocks = reinterpret_cast<Partial<SIZE, kMaxCluster>*>(shared.collected + a.select_capacity +
                                                                            a.select_attached)[-1];
            static_assert(sizeof(of_warps) <= kRingBytes && SIZE <= kThreads, "room");
            __syncthreads();
            if (lane < R::kPiecesEach) {
                float4* to = reinterpret_cast<float4*>(of_warps.output[warp] + lane * 8);
                to[0] = make_float4(own.output[0], own.output[1], own.output[2], own.output[3]);
                to[1] = make_float4(own.output[4], own.output[5], own.output[6], own.output[7]);
            }
            if (lane == 0) of_warps.maximum[warp] = own.maximum, of_warps.sum[warp] = own.sum;
            __syncthreads();
            const Channel results(shared.arrived[select::kResults], blocks);
            if (d < SIZE) {
                const float3 mine = of_warps.combine(kWarps, d);
                const auto send = [&](float& to, float x) {
                    results.send(reinterpret_cast<uint32_t*>(&to), 0, __float_as_uint(x));
                };
                send(of_blocks.output[block][d], mine.z);
                if (d == 0) send(of_blocks.maximum[block], mine.x), send(of_blocks.sum[block], mine.y);
            }
            if (block != 0) return;
            if (blocks == 1) __syncthreads();
            if (d < SIZE) {
                results.wait(0);
                const float3 all = of_blocks.combine(blocks, d);
                static_cast<T*>(a.p.output)[query * SIZE + d] = from_float<T>(all.y > 0.f ? all.z / all.y : 0.f);
            }
        });
}

template <typename T, bool CAPPED>
auto kernel_for(int head_size) -> void (*)(Arguments) {
    switch (head_size) {
        case 64:
            return select_attend_kernel<T, 64, CAPPED>;
        case 96:
            return select_attend_kernel<T, 96, CAPPED>;
        case 128:
            return select_attend_kernel<T, 128, CAPPED>;
        default:
            return select_attend_kernel<T, 256, CAPPED>;
    }
}

template <typename T>
auto kernel_for(const SocketTrtAttentionParams& p) {
    return p.softcap > 0.f ? kernel_for<T, true>(p.head_size) : kernel_for<T, false>(p.head_size);
}

}  // namespace

// Long lists take time for which it pays to divide them anew, evenly over the whole GPU; so do those of few blocks that
// may lie in pairs.
void plan_select_attend(Arguments& a, const Device& device) {
    constexpr int kLongList = 2560, kLongForFew = 512;  // slots of a block
    const int64_t blocks = static_cast<int64_t>(a.items) * a.select_heads * a.select_blocks;
    const int most = a.select_spread || 4 * blocks >= 3 * device.multiprocessors ? kLongList : kLongForFew;
    if (device.architecture < 90 || !a.combined || a.list_stride > most * a.select_blocks) return;
    // List and results lie behind what is collected, over which the rings come to lie.
    constexpr int kMostStep = 8;
    const int listed = select::slots_of_block(a.list_stride, a.select_blocks, kMostStep);
    const int attached = listed + kMaxCluster * (a.p.head_size + 2);
    const int capacity = (a.select_capacity - attached) / kWarps * kWarps;
    if (capacity < select::kLeastCapacity || capacity < select::expected_keys(a) / a.select_blocks) return;
    if (offsetof(select::Shared, collected) + capacity * sizeof(uint32_t) < kRings + kRingBytes) return;
    a.select_capacity = capacity;
    a.select_attached = attached;
    a.select_attends = 1;
}

cudaError_t launch_select_attend(const Arguments& a, cudaStream_t stream) {
    const auto kernel = a.p.dtype == SOCKET_TRT_FLOAT16 ? kernel_for<__half>(a.p) : kernel_for<__nv_bfloat16>(a.p);
    return select::launch(kernel, a, stream);
}

}  // namespace socket_trt
