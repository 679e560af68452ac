// Last kernel of a decode: the partial results of each item and head, weighted by their softmax sums, become the
// output.
#include "device.cuh"
#include "launchers.h"

namespace socket_trt {
namespace {

constexpr int kAtOnce = 8;

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
    float maximum = -INFINITY, sum = 0.f, output = 0.f;
    for (int first = 0; first < splits; first += kAtOnce) {
        float2 part[kAtOnce];
        float value[kAtOnce];
#pragma unroll
        for (int s = 0; s < kAtOnce; s++) {  // all loads before anything waits for one
            const bool exists = first + s < splits;
            part[s] = exists ? stats[first + s] : make_float2(-INFINITY, 0.f);
            value[s] = exists ? partial[static_cast<int64_t>(first + s) * a.p.head_size] : 0.f;
        }
        float new_maximum = maximum;
#pragma unroll
        for (int s = 0; s < kAtOnce; s++) new_maximum = fmaxf(new_maximum, part[s].x);
        if (new_maximum == -INFINITY) continue;
        const float factor = exp2f(maximum - new_maximum);
        sum *= factor;
        output *= factor;
#pragma unroll
        for (int s = 0; s < kAtOnce; s++) {
            if (part[s].y > 0.f) {  // a part without tokens has written no output
                const float weight = exp2f(part[s].x - new_maximum);
                sum += weight * part[s].y;
                output += weight * value[s];
            }
        }
        maximum = new_maximum;
    }
    static_cast<T*>(
        a.p.output)[(static_cast<int64_t>(blockIdx.x) * a.p.tokens + item.token) * a.p.head_size + threadIdx.x] =
        from_float<T>(sum > 0.f ? output / sum : 0.f);
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
