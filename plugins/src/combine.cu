// Last kernel of a decode: the partial results of each item and head, weighted by their softmax sums, become the
// output.
#include "device.cuh"
#include "launchers.h"

namespace socket_trt {
namespace {

template <typename T>
__global__ void combine_kernel(const __grid_constant__ Arguments a) {
    const Item item = a.item[blockIdx.y];
    if (item.mode == kItemNone) return;
    const int splits = item.mode == kItemSparse ? a.sparse_splits : a.dense_splits;
    const int room = max(a.sparse_splits, a.dense_splits);
    const int64_t first = (static_cast<int64_t>(blockIdx.y) * a.p.query_heads + blockIdx.x) * room;
    const float2* stats = reinterpret_cast<const float2*>(a.partial_stats) + first;
    const float* partial = a.partial_output + first * a.p.head_size + threadIdx.x;
    float maximum = -INFINITY;
    for (int s = 0; s < splits; s++) maximum = fmaxf(maximum, stats[s].x);
    float sum = 0.f, output = 0.f;
#pragma unroll 4
    for (int s = 0; s < splits; s++) {
        const float2 part = stats[s];
        if (part.y > 0.f) {  // a part without tokens has written no output
            const float weight = exp2f(part.x - maximum);
            sum += weight * part.y;
            output += weight * partial[static_cast<int64_t>(s) * a.p.head_size];
        }
    }
    static_cast<T*>(
        a.p.output)[(static_cast<int64_t>(blockIdx.x) * a.p.tokens + item.token) * a.p.head_size + threadIdx.x] =
        from_float<T>(sum > 0.f ? output / sum : 0.f);
}

}  // namespace

cudaError_t launch_combine(const Arguments& a, cudaStream_t stream) {
    const Launch launch(dim3(a.p.query_heads, a.items), dim3(a.p.head_size), 0, stream);
    return a.p.dtype == SOCKET_TRT_FLOAT16 ? launch(combine_kernel<__half>, a)
                                           : launch(combine_kernel<__nv_bfloat16>, a);
}

}  // namespace socket_trt
