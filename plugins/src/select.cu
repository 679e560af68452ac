// The kernel that lists what each selecting head of the sparse items attends to, and how selection is laid out.
#include <cmath>

#include "select.cuh"

namespace socket_trt {
namespace {

__global__ __launch_bounds__(select::kThreads, 2) void select_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) char dynamic[];
    select::Selected head;
    select::select_head(a, *reinterpret_cast<select::Shared*>(dynamic), head);
}

}  // namespace

int plan_select_capacity(const Device& device) {
    const auto room = [&](int blocks) {
        const int bytes = (device.shared_memory + kSystemShared) / blocks - kSystemShared;
        return (bytes - static_cast<int>(sizeof(select::Shared))) / 4 / select::kWarps * select::kWarps;
    };
    // Two blocks a multiprocessor where that leaves each enough.
    return room(2) >= select::kLeastCapacity ? room(2) : room(1);
}

int plan_select(const Arguments& a, const Device& device) {
    int blocks = 1;
    if (device.architecture < 90) return blocks;
    const int64_t heads = static_cast<int64_t>(a.items) * a.select_heads;
    // What the sample lets through, with some room for warps that get more than their share.
    const double budget = static_cast<double>(a.list_stride) / a.max_length;
    const double collected = 1.25 * (budget + 4 * std::sqrt(budget / select::kMostSamples)) * a.max_length;
    // Clusters must find room in one part of the GPU: one block a multiprocessor leaves them enough.
    while (blocks < select::kMaxBlocks && a.max_length / (blocks * 2) >= select::kLeastTokens &&
           (heads * blocks * 2 <= device.multiprocessors || collected / blocks > a.select_capacity)) {
        blocks *= 2;
    }
    return blocks;
}

cudaError_t launch_select(const Arguments& a, cudaStream_t stream) {
    return select::launch(select_kernel, a, stream);
}

}  // namespace socket_trt
