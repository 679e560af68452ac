#include "launch.h"

#include <array>
#include <cstring>
#include <mutex>
#include <vector>

#include "launchers.h"

namespace socket_trt {
namespace {

constexpr int kMaxArguments = 32;

// Handles of the embedded kernels, by table index; loaded once a device.
struct Loaded {
    std::once_flag once;
    cudaError_t status = cudaErrorNotReady;
    std::vector<cudaKernel_t> kernels;
};
std::array<Loaded, kMaxDevices>& loaded_kernels() {
    static std::array<Loaded, kMaxDevices> loaded;
    return loaded;
}

bool suits(const EmbeddedKernel& kernel, int architecture) {
    // A binary runs on its own architecture and on later ones of the same generation.
    return kernel.architecture == 0 ||
           (kernel.architecture / 10 == architecture / 10 && kernel.architecture <= architecture);
}

cudaError_t load(const EmbeddedKernel& entry, int device, cudaKernel_t& kernel) {
    cudaLibrary_t library;
    cudaError_t status = cudaLibraryLoadData(&library, entry.image, nullptr, nullptr, 0, nullptr, nullptr, 0);
    if (status != cudaSuccess) return status;
    status = cudaLibraryGetKernel(&kernel, library, entry.symbol);
    if (status != cudaSuccess) return status;
    status = cudaKernelSetAttributeForDevice(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, entry.shared_memory,
                                             device);
    if (status != cudaSuccess) return status;
    return cudaKernelSetAttributeForDevice(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                           cudaSharedmemCarveoutMaxShared, device);
}

}  // namespace

const EmbeddedKernel* find_kernel(const char* name, int dtype, int head_size, int architecture) {
    const EmbeddedKernel* best = nullptr;
    for (int i = 0; i < kEmbeddedKernelCount; i++) {
        const EmbeddedKernel& kernel = kEmbeddedKernels[i];
        if (kernel.dtype != dtype || kernel.head_size != head_size || std::strcmp(kernel.name, name) != 0) continue;
        if (suits(kernel, architecture) && (best == nullptr || kernel.architecture > best->architecture))
            best = &kernel;
    }
    return best;
}

cudaError_t load_kernels(const Device& device) {
    if (device.ordinal < 0 || device.ordinal >= kMaxDevices) return cudaErrorInvalidDevice;
    Loaded& loaded = loaded_kernels()[device.ordinal];
    std::call_once(loaded.once, [&] {
        loaded.kernels.assign(kEmbeddedKernelCount, nullptr);
        loaded.status = cudaSuccess;
        for (int i = 0; i < kEmbeddedKernelCount && loaded.status == cudaSuccess; i++) {
            const EmbeddedKernel& entry = kEmbeddedKernels[i];
            if (find_kernel(entry.name, entry.dtype, entry.head_size, device.architecture) == &entry) {
                loaded.status = load(entry, device.ordinal, loaded.kernels[i]);
            }
        }
    });
    return loaded.status;
}

cudaError_t launch_embedded(const char* name, int dtype, int head_size, const Device& device, dim3 grid,
                            bool overlapped, cudaStream_t stream, std::initializer_list<const void*> arguments) {
    const EmbeddedKernel* entry = find_kernel(name, dtype, head_size, device.architecture);
    if (entry == nullptr) return cudaErrorNoKernelImageForDevice;
    const cudaKernel_t kernel = loaded_kernels()[device.ordinal].kernels[entry - kEmbeddedKernels];
    static void* const no_scratch = nullptr;
    void* pointers[kMaxArguments];
    int count = 0;
    for (const void* argument : arguments) pointers[count++] = const_cast<void*>(argument);
    for (int i = 0; i < 2; i++) pointers[count++] = const_cast<void**>(&no_scratch);
    Launch launch(grid, dim3(entry->threads), entry->shared_memory, stream);
    launch.overlapped(overlapped && entry->architecture >= 90);  // older ones and PTX do not wait
    return launch.by_pointers(kernel, pointers);
}

}  // namespace socket_trt
