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

// How the scoring kernel is laid out for given shapes; heads == 0: nothing fits the device.
struct ScorePlan {
    int heads;   // query heads that one look-up serves: 4, 2 or 1
    int passes;  // times a block reads its codes (several only for selection kv_head above 8 planes)
    int warps;
    int chunks;       // blocks that share one item and group of heads
    int head_blocks;  // groups of heads
    int shared_memory;
};
ScorePlan plan_score(const Arguments& a, const Device& device);

cudaError_t launch_append(const Arguments& a, cudaStream_t stream);
cudaError_t launch_score(const Arguments& a, const ScorePlan& plan, cudaStream_t stream);
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

    template <typename... Parameters, typename... Values>
    cudaError_t operator()(void (*kernel)(Parameters...), const Values&... values) const {
        return cudaLaunchKernelEx(&config_, kernel, values...);
    }
    cudaError_t by_pointers(const void* kernel, void** parameters) const {
        return cudaLaunchKernelExC(&config_, kernel, parameters);
    }

  private:
    cudaLaunchConfig_t config_{};
};

}  // namespace socket_trt

#endif  // SOCKET_TRT_LAUNCHERS_H_
