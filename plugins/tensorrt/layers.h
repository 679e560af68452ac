// What lies around attention, as layers of an engine for TensorRT 8.6: what each takes, gives and computes.
//
// TensorRT 8.6 makes a norm of seven kernels and a rotary embedding of as many, and has no kernels for Hopper's
// products of few tokens; where weights are inputs it calls no library's either.  Later versions do better.  layer_v2.h
// makes plugins of these; all tensors are float16.
#ifndef SOCKET_TRT_TENSORRT_LAYERS_H_
#define SOCKET_TRT_TENSORRT_LAYERS_H_

#include <NvInfer.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core.h"

namespace socket_trt {
namespace tensorrt {

// An attribute of a layer, and what it may be.
struct LayerField {
    const char* name;
    bool real;  // or an integer
    double low, high;
};

// A layer is made of its attributes' values, in the order of its fields.
class Layer {
  public:
    using Dims = nvinfer1::Dims;
    using DimsExprs = nvinfer1::DimsExprs;

    virtual ~Layer() = default;
    // Throws PluginError for inputs that do not fit each other or the attributes.
    virtual void check(const Dims* inputs) const = 0;
    virtual DimsExprs output(int32_t index, const DimsExprs* inputs, nvinfer1::IExprBuilder& builder) const = 0;
    virtual size_t workspace_bytes() const { return 0; }
    // What cannot be done while a stream is captured.  Throws PluginError.
    virtual void prepare() const;
    virtual void enqueue(const Dims* input_dims, const void* const* inputs, void* const* outputs, void* workspace,
                         cudaStream_t stream) const = 0;
};

// activations [tokens, columns], weight [rows, columns] -> their product [tokens, rows]; by cuBLAS but for one or two
// tokens.
class Linear final : public Layer {
  public:
    static constexpr char kName[] = "Linear";
    static constexpr int32_t kInputs = 2, kOutputs = 1;
    static std::vector<LayerField> fields() { return {}; }

    explicit Linear(const std::vector<double>&) {}
    void check(const Dims* inputs) const override;
    DimsExprs output(int32_t index, const DimsExprs* inputs, nvinfer1::IExprBuilder& builder) const override;
    size_t workspace_bytes() const override;
    void prepare() const override;
    void enqueue(const Dims* dims, const void* const* inputs, void* const* outputs, void* workspace,
                 cudaStream_t stream) const override;
};

// input [..., columns], weight [columns] -> the norm of the input's rows times the weight, or times 1 + weight.
class RmsNorm : public Layer {
  public:
    static constexpr char kName[] = "RMSNorm";
    static constexpr int32_t kInputs = 2, kOutputs = 1;
    static std::vector<LayerField> fields() { return {{"epsilon", true, 0., 1.}, {"plus_one", false, 0., 1.}}; }

    explicit RmsNorm(const std::vector<double>& values)
        : epsilon_(static_cast<float>(values[0])), plus_one_(static_cast<int32_t>(values[1])) {}
    void check(const Dims* inputs) const override;
    DimsExprs output(int32_t index, const DimsExprs* inputs, nvinfer1::IExprBuilder& builder) const override;
    void enqueue(const Dims* dims, const void* const* inputs, void* const* outputs, void* workspace,
                 cudaStream_t stream) const override;

  protected:
    const float epsilon_;
    const int32_t plus_one_;
};

// residual and branch [tokens, columns], weight [columns] -> their sum, and its norm as RMSNorm's.
class AddRmsNorm final : public RmsNorm {
  public:
    static constexpr char kName[] = "AddRMSNorm";
    static constexpr int32_t kInputs = 3, kOutputs = 2;

    using RmsNorm::RmsNorm;
    void check(const Dims* inputs) const override;
    void enqueue(const Dims* dims, const void* const* inputs, void* const* outputs, void* workspace,
                 cudaStream_t stream) const override;
};

// joint [tokens, (query_heads + 2 kv_heads) head_size], cosines and sines [tokens, head_size] -> query [1, query_heads,
// tokens, head_size] and key with their rotary embedding, and value [1, kv_heads, tokens, head_size].
class SplitRotary final : public Layer {
  public:
    static constexpr char kName[] = "SplitRotary";
    static constexpr int32_t kInputs = 3, kOutputs = 3;
    static std::vector<LayerField> fields() {
        return {{"query_heads", false, 1., 65536.}, {"kv_heads", false, 1., 65536.}};
    }

    explicit SplitRotary(const std::vector<double>& values)
        : query_heads_(static_cast<int32_t>(values[0])), kv_heads_(static_cast<int32_t>(values[1])) {}
    void check(const Dims* inputs) const override;
    DimsExprs output(int32_t index, const DimsExprs* inputs, nvinfer1::IExprBuilder& builder) const override;
    void enqueue(const Dims* dims, const void* const* inputs, void* const* outputs, void* workspace,
                 cudaStream_t stream) const override;

  private:
    const int32_t query_heads_;
    const int32_t kv_heads_;
};

// joint [tokens, 2 columns], a gate and what it lets through -> silu(gate) * up [tokens, columns].
class SwiGlu final : public Layer {
  public:
    static constexpr char kName[] = "SwiGLU";
    static constexpr int32_t kInputs = 1, kOutputs = 1;
    static std::vector<LayerField> fields() { return {}; }

    explicit SwiGlu(const std::vector<double>&) {}
    void check(const Dims* inputs) const override;
    DimsExprs output(int32_t index, const DimsExprs* inputs, nvinfer1::IExprBuilder& builder) const override;
    void enqueue(const Dims* dims, const void* const* inputs, void* const* outputs, void* workspace,
                 cudaStream_t stream) const override;
};

}  // namespace tensorrt
}  // namespace socket_trt

#endif  // SOCKET_TRT_TENSORRT_LAYERS_H_
