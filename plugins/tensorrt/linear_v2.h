// Linear as an IPluginV2DynamicExt: the products of an engine for TensorRT 8.6, computed by cuBLAS.
//
// TensorRT 8.6 has no kernels for Hopper's products of few tokens, and does not call cuBLAS where weights are inputs.
// Later versions have kernels for Hopper.  Included by plugin_v2.cpp.
#ifndef SOCKET_TRT_TENSORRT_LINEAR_V2_H_
#define SOCKET_TRT_TENSORRT_LINEAR_V2_H_

#include <cstring>

#include "adapter.h"
#include "cublas.h"

namespace socket_trt {
namespace tensorrt {
namespace {

constexpr char kLinearName[] = "Linear";
constexpr char kLinearVersion[] = "1";
// What an engine holds of it: with which release it was built.
constexpr char kLinearData[] = "Linear " SOCKET_TRT_RELEASE;
constexpr size_t kLinearBytes = sizeof(kLinearData) - 1;

// Inputs: activations [tokens, columns] and a weight [rows, columns]; output: [tokens, rows].  All float16.
class LinearV2 : public nvinfer1::IPluginV2DynamicExt {
  public:
    LinearV2(const std::string& layer, bool from_engine, const std::string& plugin_namespace)
        : layer_(layer), from_engine_(from_engine), namespace_(plugin_namespace) {}

    // ---- IPluginV2 ----

    const char* getPluginType() const noexcept override { return kLinearName; }
    const char* getPluginVersion() const noexcept override { return kLinearVersion; }
    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t initialize() noexcept override {
        return guard(1, [&] {
            if (from_engine_) prepare_products();
            return 0;
        });
    }
    void terminate() noexcept override {}

    size_t getSerializationSize() const noexcept override { return kLinearBytes; }
    void serialize(void* buffer) const noexcept override { std::memcpy(buffer, kLinearData, kLinearBytes); }
    void destroy() noexcept override { delete this; }

    void setPluginNamespace(const char* name) noexcept override {
        set_namespace(namespace_, name, layer_.c_str(), kLinearName);
    }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

    // ---- IPluginV2Ext ----

    nvinfer1::DataType getOutputDataType(int32_t, const nvinfer1::DataType* inputs, int32_t) const noexcept override {
        return inputs[0];
    }

    // ---- IPluginV2DynamicExt ----

    nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
        return guard<nvinfer1::IPluginV2DynamicExt*>(nullptr,
                                                     [&] { return new LinearV2(layer_, from_engine_, namespace_); });
    }

    nvinfer1::DimsExprs getOutputDimensions(int32_t, const nvinfer1::DimsExprs* inputs, int32_t,
                                            nvinfer1::IExprBuilder&) noexcept override {
        nvinfer1::DimsExprs output;
        output.nbDims = 2;
        output.d[0] = inputs[0].d[0];
        output.d[1] = inputs[1].d[0];
        return output;
    }

    bool supportsFormatCombination(int32_t position, const nvinfer1::PluginTensorDesc* tensors, int32_t input_count,
                                   int32_t output_count) noexcept override {
        return input_count == 2 && output_count == 1 && tensors[position].type == nvinfer1::DataType::kHALF &&
               tensors[position].format == nvinfer1::TensorFormat::kLINEAR;
    }

    // It cannot refuse: what is wrong is said here, and enqueue fails.
    void configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                         const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override {
        guard(0, [&] {
            product_of(inputs[0].max, inputs[1].max);
            return 0;
        });
    }

    size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                            int32_t) const noexcept override {
        return kProductWorkspaceBytes;
    }

    int32_t enqueue(const nvinfer1::PluginTensorDesc* input_desc, const nvinfer1::PluginTensorDesc*,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override {
        if (!from_engine_) return 0;  // the builder's timing has nothing to choose from
        return guard(1, [&] {
            Product product = product_of(input_desc[0].dims, input_desc[1].dims);
            product.activations = inputs[0];
            product.weight = inputs[1];
            product.output = outputs[0];
            enqueue_product(product, workspace, stream);
            return 0;
        });
    }

  private:
    template <typename Result, typename Call>
    Result guard(Result fallback, const Call& call) const noexcept {
        return guarded(layer_.c_str(), fallback, call, kLinearName);
    }

    // Sizes of the product.  Throws PluginError for operands that do not fit.
    static Product product_of(const nvinfer1::Dims& activations, const nvinfer1::Dims& weight) {
        if (activations.nbDims != 2 || weight.nbDims != 2 || activations.d[1] != weight.d[1]) {
            throw PluginError("activations must be [tokens, columns] and the weight [rows, columns]");
        }
        return Product{nullptr, nullptr, nullptr, activations.d[0], weight.d[0], weight.d[1]};
    }

    const std::string layer_;
    const bool from_engine_;
    std::string namespace_;
};

class LinearCreatorV2 : public nvinfer1::IPluginCreator {
  public:
    nvinfer1::IPluginV2* createPlugin(const char* layer, const nvinfer1::PluginFieldCollection*) noexcept override {
        return guard<nvinfer1::IPluginV2*>(
            layer, nullptr, [&] { return new LinearV2(layer == nullptr ? "" : layer, false, namespace_); });
    }
    nvinfer1::IPluginV2* deserializePlugin(const char* layer, const void* data, size_t size) noexcept override {
        return guard<nvinfer1::IPluginV2*>(layer, nullptr, [&] {
            const std::string bytes(static_cast<const char*>(data), data == nullptr ? 0 : size);
            if (bytes != kLinearData) {
                throw PluginError("the engine's data for this plugin is '" + bytes + "', this library's is '" +
                                  kLinearData + "': build the engine again, or load the library of its release");
            }
            return new LinearV2(layer == nullptr ? "" : layer, true, namespace_);
        });
    }

    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
        static const nvinfer1::PluginFieldCollection none{0, nullptr};
        return &none;
    }
    const char* getPluginName() const noexcept override { return kLinearName; }
    const char* getPluginVersion() const noexcept override { return kLinearVersion; }
    void setPluginNamespace(const char* name) noexcept override { set_namespace(namespace_, name, "", kLinearName); }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

  private:
    template <typename Result, typename Call>
    static Result guard(const char* layer, Result fallback, const Call& call) noexcept {
        return guarded(layer, fallback, call, kLinearName);
    }

    std::string namespace_ = kPluginNamespace;
};

}  // namespace
}  // namespace tensorrt
}  // namespace socket_trt

// 120901 where cuBLAS 12.9.1 is there for Linear, 0 where none is.
int32_t SocketTrtPluginCublas(void) {
    return socket_trt::tensorrt::cublas_version();
}

#endif  // SOCKET_TRT_TENSORRT_LINEAR_V2_H_
