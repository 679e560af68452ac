#include "layers.h"

#include <cuda_runtime_api.h>

#include "cublas.h"
#include "socket_trt/layers.h"

namespace socket_trt {
namespace tensorrt {
namespace {

bool is_matrix(const nvinfer1::Dims& dims) {
    return dims.nbDims == 2;
}

void require(bool fits, const std::string& expected) {
    if (!fits) throw PluginError("its inputs do not fit: expected " + expected);
}

void require_enqueued(int32_t status) {
    if (status == cudaSuccess) return;
    throw PluginError(std::string("cannot be enqueued: ") + cudaGetErrorString(static_cast<cudaError_t>(status)));
}

}  // namespace

void Layer::prepare() const {
    const int32_t status = SocketTrtPrepareLayers();
    if (status == cudaSuccess) return;
    throw PluginError(std::string("CUDA cannot load its kernels: ") +
                      cudaGetErrorString(static_cast<cudaError_t>(status)));
}

// ---- Linear ----

void Linear::check(const Dims* inputs) const {
    require(is_matrix(inputs[0]) && is_matrix(inputs[1]) && inputs[0].d[1] == inputs[1].d[1],
            "activations [tokens, columns] and a weight [rows, columns]");
}

nvinfer1::DimsExprs Linear::output(int32_t, const DimsExprs* inputs, nvinfer1::IExprBuilder&) const {
    DimsExprs output;
    output.nbDims = 2;
    output.d[0] = inputs[0].d[0];
    output.d[1] = inputs[1].d[0];
    return output;
}

size_t Linear::workspace_bytes() const {
    return kProductWorkspaceBytes;
}

void Linear::prepare() const {
    Layer::prepare();
    prepare_products();
}

void Linear::enqueue(const Dims* dims, const void* const* inputs, void* const* outputs, void* workspace,
                     cudaStream_t stream) const {
    const Product product{inputs[0], inputs[1], outputs[0], dims[0].d[0], dims[1].d[0], dims[0].d[1]};
    const bool aligned = product.columns % 8 == 0 && reinterpret_cast<uintptr_t>(product.weight) % 16 == 0;
    if (product.tokens > SOCKET_TRT_MOST_PRODUCT_TOKENS || !aligned) return enqueue_product(product, workspace, stream);
    require_enqueued(SocketTrtProduct(product.activations, product.weight, product.output, product.tokens, product.rows,
                                      product.columns, stream));
}

// ---- RMSNorm ----

void RmsNorm::check(const Dims* inputs) const {
    const int32_t rank = inputs[0].nbDims;
    require(rank >= 2 && inputs[1].nbDims == 1 && inputs[0].d[rank - 1] == inputs[1].d[0],
            "input [..., columns] and a weight [columns]");
}

nvinfer1::DimsExprs RmsNorm::output(int32_t, const DimsExprs* inputs, nvinfer1::IExprBuilder&) const {
    return inputs[0];
}

void RmsNorm::enqueue(const Dims* dims, const void* const* inputs, void* const* outputs, void*,
                      cudaStream_t stream) const {
    const int32_t last = dims[0].nbDims - 1;
    int32_t rows = 1;
    for (int32_t i = 0; i < last; i++) rows *= dims[0].d[i];
    require_enqueued(
        SocketTrtRmsNorm(inputs[0], inputs[1], outputs[0], rows, dims[0].d[last], epsilon_, plus_one_, stream));
}

// ---- AddRMSNorm ----

void AddRmsNorm::check(const Dims* inputs) const {
    require(is_matrix(inputs[0]) && is_matrix(inputs[1]) && inputs[2].nbDims == 1 && inputs[0].d[1] == inputs[1].d[1] &&
                inputs[0].d[1] == inputs[2].d[0],
            "residual and branch [tokens, columns] and a weight [columns]");
}

void AddRmsNorm::enqueue(const Dims* dims, const void* const* inputs, void* const* outputs, void*,
                         cudaStream_t stream) const {
    require_enqueued(SocketTrtAddRmsNorm(inputs[0], inputs[1], inputs[2], outputs[0], outputs[1], dims[0].d[0],
                                         dims[0].d[1], epsilon_, plus_one_, stream));
}

// ---- SplitRotary ----

void SplitRotary::check(const Dims* inputs) const {
    require(is_matrix(inputs[0]) && is_matrix(inputs[1]) && is_matrix(inputs[2]) && inputs[1].d[1] == inputs[2].d[1] &&
                inputs[0].d[1] == (query_heads_ + 2 * kv_heads_) * inputs[1].d[1],
            "joint [tokens, (query_heads + 2 kv_heads) head_size], cosines and sines [tokens, head_size]");
}

nvinfer1::DimsExprs SplitRotary::output(int32_t index, const DimsExprs* inputs, nvinfer1::IExprBuilder& builder) const {
    DimsExprs output;
    output.nbDims = 4;
    output.d[0] = builder.constant(1);
    output.d[1] = builder.constant(index == 0 ? query_heads_ : kv_heads_);
    output.d[2] = inputs[0].d[0];
    output.d[3] = inputs[1].d[1];
    return output;
}

void SplitRotary::enqueue(const Dims* dims, const void* const* inputs, void* const* outputs, void*,
                          cudaStream_t stream) const {
    require_enqueued(SocketTrtSplitRotary(inputs[0], inputs[1], inputs[2], outputs[0], outputs[1], outputs[2],
                                          dims[0].d[0], query_heads_, kv_heads_, dims[1].d[1], stream));
}

// ---- SwiGLU ----

void SwiGlu::check(const Dims* inputs) const {
    require(is_matrix(inputs[0]) && inputs[0].d[1] % 2 == 0, "joint [tokens, 2 columns]");
}

nvinfer1::DimsExprs SwiGlu::output(int32_t, const DimsExprs* inputs, nvinfer1::IExprBuilder& builder) const {
    DimsExprs output;
    output.nbDims = 2;
    output.d[0] = inputs[0].d[0];
    output.d[1] = builder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *inputs[0].d[1], *builder.constant(2));
    return output;
}

void SwiGlu::enqueue(const Dims* dims, const void* const* inputs, void* const* outputs, void*,
                     cudaStream_t stream) const {
    require_enqueued(SocketTrtSwiGlu(inputs[0], outputs[0], dims[0].d[0], dims[0].d[1] / 2, stream));
}

}  // namespace tensorrt
}  // namespace socket_trt
