// The Triton kernels that plugins/triton/compile.py embedded in the library, and how they are found and launched.
#ifndef SOCKET_TRT_LAUNCH_H_
#define SOCKET_TRT_LAUNCH_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <initializer_list>

namespace socket_trt {

// A row of the launch table.  A kernel takes its arguments in the order of its Python source, then two scratch
// pointers.
struct EmbeddedKernel {
    const char* name;  // of the variant
    int architecture;  // 0: PTX, for devices that no binary suits
    int dtype;
    int head_size;
    const char* symbol;
    int threads;
    int shared_memory;
    const unsigned char* image;
};
extern const EmbeddedKernel kEmbeddedKernels[];
extern const int kEmbeddedKernelCount;

struct Device;

// The entry that runs on `architecture`: its own, else the newest older one of the same generation, else PTX.
const EmbeddedKernel* find_kernel(const char* name, int dtype, int head_size, int architecture);

// Load every kernel that suits the device; later calls return at once.
cudaError_t load_kernels(const Device& device);

// Launch a kernel, `overlapped` with the one before it if it is made for that; nullptr-terminated scratch pointers are
// added to `arguments`.
cudaError_t launch_embedded(const char* name, int dtype, int head_size, const Device& device, dim3 grid,
                            bool overlapped, cudaStream_t stream, std::initializer_list<const void*> arguments);

}  // namespace socket_trt

#endif  // SOCKET_TRT_LAUNCH_H_
