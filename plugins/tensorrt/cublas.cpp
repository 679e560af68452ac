#include "cublas.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>

#include "core.h"

namespace socket_trt {
namespace tensorrt {
namespace {

// Of cuBLAS's interface, which is C and has had these values since version 11.
using Handle = void*;
constexpr int kSuccess = 0;
constexpr int kAsStored = 0, kTransposed = 1;
constexpr int kFloat16 = 2;
constexpr int kSumInFloat32 = 68;
constexpr int kDefaultAlgorithm = -1;

struct Library {
    int (*get_property)(int, int*);
    int (*create)(Handle*);
    int (*set_stream)(Handle, cudaStream_t);
    int (*set_workspace)(Handle, void*, size_t);
    int (*gemm)(Handle, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*,
                void*, int, int, int, int);
};

template <typename Function>
bool find(void* library, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library, name));
    return function != nullptr;
}

// Null where it is not there.
const Library* find_library() {
    static const Library* const found = []() -> const Library* {
        void* handle = dlopen("libcublas.so.12", RTLD_NOW | RTLD_LOCAL);
        static Library library;
        const bool whole =
            handle != nullptr && find(handle, "cublasGetProperty", library.get_property) &&
            find(handle, "cublasCreate_v2", library.create) && find(handle, "cublasSetStream_v2", library.set_stream) &&
            find(handle, "cublasSetWorkspace_v2", library.set_workspace) && find(handle, "cublasGemmEx", library.gemm);
        return whole ? &library : nullptr;
    }();
    return found;
}

const Library& library() {
    const Library* found = find_library();
    if (found == nullptr) {
        throw PluginError(
            "no cuBLAS 12 (libcublas.so.12), which this engine's products are computed by: install it (pip install "
            "nvidia-cublas-cu12), or compile the engine again without it");
    }
    return *found;
}

void check(int status, const char* what) {
    if (status != kSuccess) throw PluginError(std::string(what) + " failed: status " + std::to_string(status));
}

// One handle for a device and process: each takes some 60 MB, and a session has dozens of contexts with a hundred
// layers.  The mutex is held from setting the handle's stream to launching on it.  Handles live as long as the process:
// at its end the driver may be gone before they are.
std::mutex mutex;

Handle handle_of_device() {
    static std::map<int, Handle> handles;
    const Library& cublas = library();
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) throw PluginError("there is no CUDA device");
    Handle& handle = handles[device];
    if (handle == nullptr) check(cublas.create(&handle), "cublasCreate");
    return handle;
}

}  // namespace

int32_t cublas_version() {
    const Library* found = find_library();
    if (found == nullptr) return 0;
    int version = 0;
    for (int part = 0; part < 3; part++) {  // major, minor, patch
        int value = 0;
        if (found->get_property(part, &value) != kSuccess) return 0;
        version = 100 * version + value;
    }
    return version;
}

void prepare_products() {
    const std::lock_guard<std::mutex> lock(mutex);
    handle_of_device();
}

void enqueue_product(const Product& product, void* workspace, void* stream) {
    const Library& cublas = library();
    const std::lock_guard<std::mutex> lock(mutex);
    Handle handle = handle_of_device();
    check(cublas.set_stream(handle, static_cast<cudaStream_t>(stream)), "cublasSetStream");
    // After the stream, which sets it back.  Without one of ours, captured products would allocate their own.
    check(cublas.set_workspace(handle, workspace, kProductWorkspaceBytes), "cublasSetWorkspace");
    const float one = 1.f, zero = 0.f;
    // cuBLAS counts columns first: a row-major matrix is its transpose.
    check(cublas.gemm(handle, kTransposed, kAsStored, product.rows, product.tokens, product.columns, &one,
                      product.weight, kFloat16, product.columns, product.activations, kFloat16, product.columns, &zero,
                      product.output, kFloat16, product.rows, kSumInFloat32, kDefaultAlgorithm),
          "cublasGemmEx");
}

}  // namespace tensorrt
}  // namespace socket_trt
