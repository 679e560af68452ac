// cuBLAS, as far as products of activations and weights need it.
//
// TensorRT 8.6 depends on cuBLAS itself, so that a process which has loaded the one has loaded the other.  The library
// is looked up there when it is first needed: building takes neither its headers nor a link to it.
#ifndef SOCKET_TRT_TENSORRT_CUBLAS_H_
#define SOCKET_TRT_TENSORRT_CUBLAS_H_

#include <cstddef>
#include <cstdint>

namespace socket_trt {
namespace tensorrt {

// output [tokens, rows] = activations [tokens, columns] times weight [rows, columns] transposed; float16, row-major,
// summed in float32.
struct Product {
    const void* activations;
    const void* weight;
    void* output;
    int32_t tokens;
    int32_t rows;
    int32_t columns;
};

// What cuBLAS asks for on Hopper; elsewhere less would do.
constexpr size_t kProductWorkspaceBytes = size_t{32} << 20;

// 120901 for 12.9.1; 0 where there is no cuBLAS 12, or only something that bears its name.
int32_t cublas_version();

// Make cuBLAS ready for the current device, which cannot be done while a stream is captured.  Throws PluginError where
// there is no cuBLAS, or where it fails.
void prepare_products();

// Enqueue one product, with `kProductWorkspaceBytes` at `workspace`.  Throws what prepare_products throws.
void enqueue_product(const Product& product, void* workspace, void* stream);

}  // namespace tensorrt
}  // namespace socket_trt

#endif  // SOCKET_TRT_TENSORRT_CUBLAS_H_
