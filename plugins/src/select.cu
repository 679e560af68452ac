// The kernel that lists what each selecting head of the sparse items attends to, and how selection is laid out.
#include <cmath>

#include "launchers.h"
#include "select.cuh"

namespace socket_trt {
namespace {

__global__ __launch_bounds__(select::kThreads, 2) void select_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) char dynamic[];
    select::Shared& shared = *reinterpret_cast<select::Shared*>(dynamic);
    select::clear_histogram(shared);
    wait_for_previous_kernel();
    const Item item = a.item[blockIdx.z];
    if (item.mode != kItemSparse) return;
    const int64_t index = static_cast<int64_t>(blockIdx.z) * a.select_heads + blockIdx.y;
    const int listed = select::select_slots(a, item, index, shared);
    if (blockIdx.x == 0 && threadIdx.x == 0) a.listed[index] = listed;
}

}  // namespace

int plan_select_capacity(const Device& device) {
    return device.shared_memory >= 160 * 1024 ? 11 * 1024 : 4 * 1024;  // two blocks a multiprocessor, or one
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
    const size_t bytes = select::shared_bytes(a);
    const cudaError_t status = set_up(select_kernel, bytes);
    if (status != cudaSuccess) return status;
    Launch launch(dim3(a.select_blocks, a.select_heads, a.items), dim3(select::kThreads), bytes, stream);
    if (a.select_blocks > 1) launch.cluster(a.select_blocks);
    return launch.overlapped(a.overlapped)(select_kernel, a);
}

}  // namespace socket_trt
