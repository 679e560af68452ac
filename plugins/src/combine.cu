// Last kernel of a decode: the partial results of each item and head, weighted by their softmax sums, become the
// output.
#include "combine_parts.cuh"
#include "launchers.h"

namespace socket_trt {
namespace {

template <typename T>
__global__ void combine_kernel(const __grid_constant__ Arguments a) {
    wait_for_previous_kernel();
    const Item item = a.item[blockIdx.y];
    if (item.mode == kItemNone || (item.mode == kItemSparse && a.combined)) return;
    const int splits = item.mode == kItemSparse ? a.sparse_splits : a.dense_splits;
    const int room = max(a.sparse_splits, a.dense_splits);
    const int64_t first = (static_cast<int64_t>(blockIdx.y) * a.p.query_heads + blockIdx.x) * room;
    const float2* stats = reinterpret_cast<const float2*>(a.partial_stats) + first;
    const float* partial = a.partial_output + first * a.p.head_size + threadIdx.x;
    const Average all = combine_parts(
        splits, [&](int i) { return stats[i]; },
        [&](int i) { return partial[static_cast<int64_t>(i) * a.p.head_size]; });
    static_cast<T*>(
        a.p.output)[(static_cast<int64_t>(blockIdx.x) * a.p.tokens + item.token) * a.p.head_size + threadIdx.x] =
        from_float<T>(all.value());
}

}  // namespace

cudaError_t launch_combine(const Arguments& a, cudaStream_t stream) {
    const auto kernel = a.p.dtype == SOCKET_TRT_FLOAT16 ? combine_kernel<__half> : combine_kernel<__nv_bfloat16>;
    const cudaError_t status = set_up(kernel, 0);
    if (status != cudaSuccess) return status;
    Launch launch(dim3(a.p.query_heads, a.items), dim3(a.p.head_size), 0, stream);
    return launch.overlapped(a.overlapped)(kernel, a);
}

}  // namespace socket_trt
