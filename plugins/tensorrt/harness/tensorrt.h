// What v2.cpp and v3.cpp share: TensorRT's structures made from a case, and objects that TensorRT itself would provide.
#ifndef SOCKET_TRT_TENSORRT_HARNESS_TENSORRT_H_
#define SOCKET_TRT_TENSORRT_HARNESS_TENSORRT_H_

#include <NvInfer.h>
#include <dlfcn.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "harness.h"
#include "socket_trt/plugin.h"

namespace harness {
namespace {

class Logger : public nvinfer1::ILogger {
  public:
    void log(Severity severity, const char* text) noexcept override { record_log(static_cast<int>(severity), text); }
};

inline void* open_library(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) expect(false, std::string("the library opens: ") + dlerror());
    return library;
}

template <typename Function>
Function* find_function(void* library, const char* name) {
    void* symbol = dlsym(library, name);
    expect(symbol != nullptr, std::string("the library exports ") + name);
    return reinterpret_cast<Function*>(symbol);
}

inline void check_library(void* plugin) {
    expect(find_function<int32_t()>(plugin, "SocketTrtPluginTensorRtMajor")() == NV_TENSORRT_MAJOR,
           "the library is for this major of TensorRT");
    expect(*find_function<const char*()>(plugin, "SocketTrtPluginRelease")() != '\0', "the library has a release");
    expect(dlsym(plugin, "SocketTrtAttention") == nullptr, "the kernels' functions stay inside the library");
}

inline nvinfer1::DataType data_type(const std::string& name) {
    if (name == "float16") return nvinfer1::DataType::kHALF;
    if (name == "int32") return nvinfer1::DataType::kINT32;
#if NV_TENSORRT_MAJOR >= 10
    if (name == "bfloat16") return nvinfer1::DataType::kBF16;
#endif
    return nvinfer1::DataType::kFLOAT;
}

inline nvinfer1::Dims dims_of(const std::vector<int64_t>& sizes) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); i++) dims.d[i] = static_cast<decltype(dims.d[0] + 0)>(sizes[i]);
    return dims;
}

inline nvinfer1::PluginTensorDesc desc_of(const Tensor& tensor, bool largest) {
    nvinfer1::PluginTensorDesc desc{};
    desc.dims = dims_of(largest ? tensor.largest : tensor.dims);
    desc.type = data_type(tensor.type);
    desc.format = nvinfer1::TensorFormat::kLINEAR;
    desc.scale = 1.f;
    return desc;
}

// Inputs, then outputs.
inline std::vector<nvinfer1::PluginTensorDesc> descs_of(const Case& shapes, bool largest) {
    std::vector<nvinfer1::PluginTensorDesc> all;
    for (const Tensor& tensor : shapes.tensors) all.push_back(desc_of(tensor, largest));
    for (const int tied : kTiedInput) all.push_back(all[tied]);
    return all;
}

// A profile whose smallest and usual shapes are the step's.
inline std::vector<nvinfer1::DynamicPluginTensorDesc> profile_of(const Case& shapes) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> all;
    const auto usual = descs_of(shapes, false), largest = descs_of(shapes, true);
    for (size_t i = 0; i < usual.size(); i++) {
        nvinfer1::DynamicPluginTensorDesc desc{};
        desc.desc = usual[i];
        desc.min = usual[i].dims;
        desc.max = largest[i].dims;
#if NV_TENSORRT_MAJOR >= 10
        desc.opt = usual[i].dims;
#endif
        for (int32_t d = 0; d < desc.desc.dims.nbDims; d++) {
            if (desc.min.d[d] != desc.max.d[d]) desc.desc.dims.d[d] = -1;  // as TensorRT writes a dynamic dimension
        }
        all.push_back(desc);
    }
    return all;
}

inline std::vector<nvinfer1::PluginField> fields_of(const std::vector<Field>& fields) {
    using nvinfer1::PluginFieldType;
    std::vector<nvinfer1::PluginField> all;
    for (const Field& field : fields) {
        PluginFieldType type = PluginFieldType::kUNKNOWN;
        if (field.type == "float32") type = PluginFieldType::kFLOAT32;
        if (field.type == "float64") type = PluginFieldType::kFLOAT64;
        if (field.type == "int32") type = PluginFieldType::kINT32;
        if (field.type == "text") type = PluginFieldType::kCHAR;
#if NV_TENSORRT_MAJOR >= 10
        if (field.type == "int64") type = PluginFieldType::kINT64;
#endif
        all.emplace_back(field.name.c_str(), field.data.empty() ? nullptr : field.data.data(), type, field.length);
    }
    return all;
}

// Dimension expressions that are constants, which is all that the harness needs.
#if NV_TENSORRT_MAJOR >= 10
using Constant = int64_t;
#else
using Constant = int32_t;
#endif
class Expression : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
  public:
    explicit Expression(int64_t value) : value_(static_cast<Constant>(value)) { mImpl = this; }

  private:
    bool isConstant() const override { return true; }
    Constant getConstantValue() const override { return value_; }
#if NV_TENSORRT_MAJOR >= 10
    bool isSizeTensor() const override { return false; }
#endif
    Constant value_;
};
class ExpressionBuilder : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
  public:
    ExpressionBuilder() { mImpl = this; }

  private:
    const nvinfer1::IDimensionExpr* constant(Constant value) override {
        made_.push_back(std::make_unique<Expression>(value));
        return made_.back().get();
    }
    // Of those that there are only the one that a plugin asks for.
    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation what, const nvinfer1::IDimensionExpr& one,
                                              const nvinfer1::IDimensionExpr& other) override {
        if (what != nvinfer1::DimensionOperation::kFLOOR_DIV) return nullptr;
        return constant(one.getConstantValue() / other.getConstantValue());
    }
#if NV_TENSORRT_MAJOR >= 10
    const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                      const nvinfer1::IDimensionExpr&) override {
        return nullptr;
    }
#endif

    std::vector<std::unique_ptr<Expression>> made_;
};

// The inputs' dimensions as expressions; `owner` keeps them alive.
inline std::vector<nvinfer1::DimsExprs> expressions_of(const Case& shapes,
                                                       std::vector<std::unique_ptr<Expression>>& owner) {
    std::vector<nvinfer1::DimsExprs> all;
    for (const Tensor& tensor : shapes.tensors) {
        nvinfer1::DimsExprs dims{};
        dims.nbDims = static_cast<int32_t>(tensor.dims.size());
        for (size_t i = 0; i < tensor.dims.size(); i++) {
            owner.emplace_back(new Expression(tensor.dims[i]));
            dims.d[i] = owner.back().get();
        }
        all.push_back(dims);
    }
    return all;
}

inline bool same_dims(const nvinfer1::DimsExprs& dims, const Tensor& tensor) {
    bool same = dims.nbDims == static_cast<int32_t>(tensor.dims.size());
    for (int32_t i = 0; same && i < dims.nbDims; i++) same = dims.d[i]->getConstantValue() == tensor.dims[i];
    return same;
}

// The creator's fields: the attributes, floats and ints only, in the order of the ONNX schema.
inline void check_advertised(const nvinfer1::PluginFieldCollection* fields) {
    using nvinfer1::PluginFieldType;
    const std::vector<std::pair<std::string, PluginFieldType>> expected = {
        {"scale", PluginFieldType::kFLOAT32},       {"temperature", PluginFieldType::kFLOAT32},
        {"sink", PluginFieldType::kINT32},          {"window", PluginFieldType::kINT32},
        {"budget_tokens", PluginFieldType::kINT32}, {"budget_permille", PluginFieldType::kINT32},
        {"min_length", PluginFieldType::kINT32},    {"selection", PluginFieldType::kINT32},
        {"page_size", PluginFieldType::kINT32},     {"sliding_window", PluginFieldType::kINT32},
        {"softcap", PluginFieldType::kFLOAT32},
    };
    expect(fields != nullptr && fields->nbFields == static_cast<int32_t>(expected.size()), "11 fields are advertised");
    for (size_t i = 0; i < expected.size(); i++) {
        expect(fields->fields[i].name == expected[i].first && fields->fields[i].type == expected[i].second,
               "field " + expected[i].first + " is advertised");
    }
}

// Calls `supports(position, descs)` with every type and layout at every position.
template <typename Supports>
void check_formats(const Case& shapes, const Supports& supports) {
    using nvinfer1::DataType;
    using nvinfer1::TensorFormat;
    const auto right = descs_of(shapes, false);
    std::vector<DataType> types = {DataType::kFLOAT, DataType::kHALF, DataType::kINT8, DataType::kINT32,
                                   DataType::kBOOL};
    std::vector<DataType> computed = {DataType::kHALF};
#if NV_TENSORRT_MAJOR >= 10
    types.insert(types.end(), {DataType::kBF16, DataType::kINT64});
    computed.push_back(DataType::kBF16);
#endif
    for (const DataType query : computed) {
        for (int position = 0; position < kInputs + kOutputs; position++) {
            auto descs = right;
            for (auto& desc : descs) {
                if (desc.type != DataType::kINT32) desc.type = query;
            }
            const DataType own = descs[position].type;
            for (const DataType type : types) {
                for (const TensorFormat format : {TensorFormat::kLINEAR, TensorFormat::kCHW2, TensorFormat::kHWC8}) {
                    descs[position].type = type;
                    descs[position].format = format;
                    const bool type_fits =
                        position == 0 ? std::count(computed.begin(), computed.end(), type) > 0 : type == own;
                    const bool expected = type_fits && format == TensorFormat::kLINEAR;
                    if (supports(position, descs) != expected) {
                        expect(false, "position " + std::to_string(position) + " with type " +
                                          std::to_string(static_cast<int>(type)) +
                                          " is supported: " + (expected ? "yes" : "no"));
                    }
                }
            }
        }
    }
    expect(true, "the right types and layouts are supported, and no other");
}

}  // namespace
}  // namespace harness

#endif  // SOCKET_TRT_TENSORRT_HARNESS_TENSORRT_H_
