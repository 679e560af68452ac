// One launcher a stage; socket_attention.cpp calls them in order.
#ifndef SOCKET_TRT_LAUNCHERS_H_
#define SOCKET_TRT_LAUNCHERS_H_

#include <cuda_runtime.h>

#include "arguments.h"

namespace socket_trt {

struct Device {
    int ordinal;
    int architecture;  // 90 for compute capability 9.0
    int multiprocessors;
    int shared_memory;  // bytes a block can have
};

// How scoring is laid out for given shapes.
struct ScorePlan {
    int columns;      // hash tables that one pass looks up; 0: the kernel for many planes
    int packing;      // what an entry of the look-up table holds
    int passes;       // times a block reads codes, each time of other hash tables
    int warps;
    int head_blocks;  // groups of query heads of a KV head
    int slots;        // blocks for each of them, over all items
    int shared_memory;
    int64_t partial_bytes;  // workspace for sums between passes
};
ScorePlan plan_score(const Arguments& a, const Device& device);
ScorePlan plan_score_wide(const Arguments& a);

// Blocks that select for one head together.
int plan_select(const Arguments& a, const Device& device);

cudaError_t launch_append(const Arguments& a, cudaStream_t stream);
cudaError_t launch_score(const Arguments& a, const ScorePlan& plan, cudaStream_t stream);
cudaError_t launch_score_wide(const Arguments& a, const ScorePlan& plan, cudaStream_t stream);
cudaError_t launch_select(const Arguments& a, cudaStream_t stream);
cudaError_t launch_combine(const Arguments& a, cudaStream_t stream);

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
        attribute_[0].id = cudaLaunchAttributeClusterDimension;
        attribute_[0].val.clusterDim.x = blocks;
        attribute_[0].val.clusterDim.y = attribute_[0].val.clusterDim.z = 1;
        config_.attrs = attribute_;
        config_.numAttrs = 1;
        return *this;
    }

    template <typename... Parameters, typename... Values>
    cudaError_t operator()(void (*kernel)(Parameters...), const Values&... values) const {
        return cudaLaunchKernelEx(&config_, kernel, values...);
    }
    cudaError_t by_pointers(const void* kernel, void** parameters) const {
        return cudaLaunchKernelExC(&config_, kernel, parameters);
    }

  private:
    cudaLaunchConfig_t config_{};
    cudaLaunchAttribute attribute_[1];
};

}  // namespace socket_trt

#endif  // SOCKET_TRT_LAUNCHERS_H_
