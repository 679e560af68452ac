// The kernel that lists what each selecting head of the sparse items attends to, and how selection is laid out.
#include "select.cuh"

namespace socket_trt {
namespace {

__global__ __launch_bounds__(select::kThreads, 2) void select_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) char dynamic[];
    select::select_head<0>(a, *reinterpret_cast<select::Shared*>(dynamic), 0, [](auto&&...) {});
}

}  // namespace

void count_clusters(Device& device) {
    for (int& count : device.clusters) count = 0;
    if (device.architecture < 90) return;
    device.clusters[1] = device.multiprocessors;
    const size_t bytes = device.shared_memory;
    cudaError_t status = set_up(select_kernel, bytes);
    for (int blocks = 2; blocks <= kMaxCluster && status == cudaSuccess; blocks++) {
        Launch launch(dim3(blocks), dim3(select::kThreads), bytes, nullptr);
        status = launch.cluster(blocks).count_clusters(select_kernel, device.clusters[blocks]);
    }
    if (status != cudaSuccess) (void)cudaGetLastError();  // a caller's next check is not about this
}

void plan_select(Arguments& a, const Device& device) {
    // Keys that a block can hold where so many share a multiprocessor.
    const auto room = [&](int sharing) {
        const int bytes = (device.shared_memory + kSystemShared) / sharing - kSystemShared;
        return (bytes - static_cast<int>(sizeof(select::Shared))) / 4 / select::kWarps * select::kWarps;
    };
    const int64_t heads = static_cast<int64_t>(a.items) * a.select_heads;
    const double collected = select::expected_keys(a);
    const auto long_enough = [&](int blocks) { return blocks == 1 || a.max_length / blocks >= select::kLeastTokens; };

    // A multiprocessor for each block, as many as find room at once: where some would have to share, the device puts
    // nearly all of them in pairs.
    for (int blocks = kMaxCluster; blocks >= 1; blocks--) {
        if (heads > device.clusters[blocks] || !long_enough(blocks) || collected / blocks > room(1)) continue;
        a.select_blocks = blocks;
        a.select_capacity = room(1);
        a.select_spread = 1;
        return;
    }
    // Two blocks a multiprocessor where that leaves each enough.
    a.select_blocks = 1;
    a.select_capacity = room(2) >= select::kLeastCapacity ? room(2) : room(1);
    if (device.architecture < 90) return;
    while (a.select_blocks < kMaxCluster && long_enough(a.select_blocks * 2) &&
           collected / a.select_blocks > a.select_capacity) {
        a.select_blocks *= 2;
    }
}

cudaError_t launch_select(const Arguments& a, cudaStream_t stream) {
    return select::launch(select_kernel, a, stream);
}

}  // namespace socket_trt
