// One launcher a stage; socket_attention.cpp calls them in order.
#ifndef SOCKET_TRT_LAUNCHERS_H_
#define SOCKET_TRT_LAUNCHERS_H_

#include <cuda_runtime.h>

#include "arguments.h"

namespace socket_trt {

constexpr int kMaxDevices = 64;
constexpr int kMaxCluster = 8;  // blocks, on any GPU that has clusters

struct Device {
    int ordinal;
    int architecture;  // 90 for compute capability 9.0
    int multiprocessors;
    int shared_memory;  // bytes a block can have
    int cache;          // bytes of the L2 cache
    // Clusters of so many blocks that it has room for at once, where each block needs a multiprocessor for itself; none
    // before compute capability 9.0.
    int clusters[kMaxCluster + 1];
};

// Bytes of shared memory that the system takes of every block, in front of the block's own.
constexpr int kSystemShared = 1024;

// Into how many parts, at most `most`, to divide each of `lanes` pieces of work, so that with `slots` parts at once all
// is done soonest.  `start` is what a part takes beside its share of the piece's `work`.
inline int best_parts(int64_t lanes, int64_t slots, int64_t most, double work, double start) {
    double best = 1e30;
    int fastest = 1;
    for (int parts = 1; parts <= most; parts++) {
        const double time = (lanes * parts + slots - 1) / slots * (work / parts + start);
        if (time < best * 0.999) {
            best = time;
            fastest = parts;
        }
    }
    return fastest;
}

// How scoring is laid out for given shapes.
struct ScorePlan {
    int columns;  // hash tables that one pass looks up; 0: the kernel for many planes
    int packing;  // what an entry of the look-up table holds
    int passes;   // times a block reads codes, each time of other hash tables
    int warps;
    int head_blocks;  // groups of query heads of a KV head
    int slots;        // blocks for each of them, over all items
    int shared_memory;
    int64_t partial_bytes;  // workspace for sums between passes
    int codes_leave_first;  // the L2 cache, before scores and sums
};
ScorePlan plan_score(const Arguments& a, const Device& device);
ScorePlan plan_score_wide(const Arguments& a);

// Sets the blocks that select for one head together, and what they have room for.
void plan_select(Arguments& a, const Device& device);
// Fills device.clusters.
void count_clusters(Device& device);
// Sets whether they attend, too, and gives the list and the results some of that room.
void plan_select_attend(Arguments& a, const Device& device);

cudaError_t launch_append(const Arguments& a, cudaStream_t stream);
cudaError_t launch_score(const Arguments& a, const ScorePlan& plan, cudaStream_t stream);
cudaError_t launch_score_wide(const Arguments& a, const ScorePlan& plan, cudaStream_t stream);
cudaError_t launch_select(const Arguments& a, cudaStream_t stream);
cudaError_t launch_select_attend(const Arguments& a, cudaStream_t stream);
cudaError_t launch_combine(const Arguments& a, cudaStream_t stream);

// Allow a kernel its shared memory.  All kernels ask for the same division of a multiprocessor's memory into cache and
// shared memory, so that none has to wait until it is divided anew.
template <typename... Parameters>
cudaError_t set_up(void (*kernel)(Parameters...), size_t shared_memory) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_memory));
    if (status != cudaSuccess) return status;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

// Where and how large a kernel runs.
class Launch {
  public:
    Launch(dim3 grid, dim3 block, size_t shared_memory, cudaStream_t stream) {
        config_.gridDim = grid;
        config_.blockDim = block;
        config_.dynamicSmemBytes = shared_memory;
        config_.stream = stream;
    }

    Launch(const Launch&) = delete;
    Launch& operator=(const Launch&) = delete;

    // Blocks (x) of the grid that run together and see each other's shared memory: from compute capability 9.0 on.
    Launch& cluster(int blocks) {
        cudaLaunchAttribute& attribute = add(cudaLaunchAttributeClusterDimension);
        attribute.val.clusterDim.x = blocks;
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        return *this;
    }
    // Begin while the kernel before still runs (wait_for_previous_kernel in device.cuh): from 9.0 on, too.
    Launch& overlapped(bool on) {
        if (on) add(cudaLaunchAttributeProgrammaticStreamSerialization).val.programmaticStreamSerializationAllowed = 1;
        return *this;
    }

    template <typename... Parameters, typename... Values>
    cudaError_t operator()(void (*kernel)(Parameters...), const Values&... values) const {
        return cudaLaunchKernelEx(&config_, kernel, values...);
    }
    // Clusters of this kernel that the device has room for at once.
    template <typename... Parameters>
    cudaError_t count_clusters(void (*kernel)(Parameters...), int& count) const {
        return cudaOccupancyMaxActiveClusters(&count, kernel, &config_);
    }
    cudaError_t by_pointers(const void* kernel, void** parameters) const {
        return cudaLaunchKernelExC(&config_, kernel, parameters);
    }

  private:
    cudaLaunchAttribute& add(cudaLaunchAttributeID id) {
        config_.attrs = attributes_;
        attributes_[config_.numAttrs].id = id;
        return attributes_[config_.numAttrs++];
    }

    cudaLaunchConfig_t config_{};
    cudaLaunchAttribute attributes_[2];
};

}  // namespace socket_trt

#endif  // SOCKET_TRT_LAUNCHERS_H_
