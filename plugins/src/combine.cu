// Last kernel of a decode: the partial results of each item and head, weighted by their softmax sums, become the
// output.
#include "device.cuh"
#include "launchers.h"

namespace socket_trt {
namespace {

constexpr int kGroups = 4;  // of threads, each with a part of the splits
constexpr int kEach = kMaxSplits / kGroups;

// An element of the output of some splits: their maximum, sum, and weighted sum of values.
struct Part {
    float maximum, sum, output;
};

// With what is added to it, in terms of the larger maximum.
__device__ __forceinline__ void add(Part& all, const Part& part) {
    const float maximum = fmaxf(all.maximum, part.maximum);
    if (maximum == -INFINITY) return;
    const float own = exp2f(all.maximum - maximum), other = exp2f(part.maximum - maximum);
    all = Part{maximum, all.sum * own + part.sum * other, all.output * own + part.output * other};
}

// A block's threads (x) have an element of the head each.
template <typename T>
__global__ __launch_bounds__(kGroups * 256) void combine_kernel(const __grid_constant__ Arguments a) {
    __shared__ Part part_of[kGroups - 1][256];
    wait_for_previous_kernel();
    const Item item = a.item[blockIdx.y];
    if (item.mode == kItemNone || (item.mode == kItemSparse && a.combined)) return;
    const int d = threadIdx.x, group = threadIdx.y;
    const int splits = item.mode == kItemSparse ? a.sparse_splits : a.dense_splits;
    const int room = max(a.sparse_splits, a.dense_splits);
    const int64_t first = (static_cast<int64_t>(blockIdx.y) * a.p.query_heads + blockIdx.x) * room;
    const float2* stats = reinterpret_cast<const float2*>(a.partial_stats) + first;
    const float* partial = a.partial_output + first * a.p.head_size + d;
    float2 stat[kEach];
    float value[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) {  // all loads before anything waits for one
        const int split = i * kGroups + group;
        stat[i] = split < splits ? stats[split] : make_float2(-INFINITY, 0.f);
        value[i] = split < splits ? partial[static_cast<int64_t>(split) * a.p.head_size] : 0.f;
    }
    Part all{-INFINITY, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kEach; i++) all.maximum = fmaxf(all.maximum, stat[i].x);
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        if (stat[i].y > 0.f) {  // a part without tokens has written no output
            const float weight = exp2f(stat[i].x - all.maximum);
            all.sum += weight * stat[i].y;
            all.output += weight * value[i];
        }
    }
    if (group > 0) part_of[group - 1][d] = all;
    __syncthreads();
    if (group > 0) return;
#pragma unroll
    for (int i = 0; i < kGroups - 1; i++) add(all, part_of[i][d]);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * a.p.tokens + item.token;
    static_cast<T*>(a.p.output)[row * a.p.head_size + d] = from_float<T>(all.sum > 0.f ? all.output / all.sum : 0.f);
}

}  // namespace

cudaError_t launch_combine(const Arguments& a, cudaStream_t stream) {
    const auto kernel = a.p.dtype == SOCKET_TRT_FLOAT16 ? combine_kernel<__half> : combine_kernel<__nv_bfloat16>;
    const cudaError_t status = set_up(kernel, 0);
    if (status != cudaSuccess) return status;
    Launch launch(dim3(a.p.query_heads, a.items), dim3(a.p.head_size, kGroups), 0, stream);
    return launch.overlapped(a.overlapped)(kernel, a);
}

}  // namespace socket_trt
