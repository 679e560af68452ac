// A layer of layers.h as an IPluginV2DynamicExt.  Included by plugin_v2.cpp.
#ifndef SOCKET_TRT_TENSORRT_LAYER_V2_H_
#define SOCKET_TRT_TENSORRT_LAYER_V2_H_

#include <cmath>
#include <cstdio>
#include <cstring>

#include "adapter.h"
#include "cublas.h"
#include "layers.h"

namespace socket_trt {
namespace tensorrt {
namespace {

constexpr char kLayerVersion[] = "1";

// What an engine holds of a layer: its name, the release that it was built with, and its attributes, as text.
template <typename Kind>
std::string layer_data(const std::vector<double>& values) {
    std::string data = std::string(Kind::kName) + " " SOCKET_TRT_RELEASE;
    for (const double value : values) {
        char text[32];
        std::snprintf(text, sizeof(text), " %.9g", value);
        data += text;
    }
    return data;
}

// The values of a layer's attributes.  Throws PluginError for missing, unknown, repeated and mistyped fields, and for
// values out of range.
template <typename Kind>
std::vector<double> layer_values(const nvinfer1::PluginFieldCollection* given) {
    const std::vector<LayerField> fields = Kind::fields();
    std::vector<double> values(fields.size(), NAN);
    if (given == nullptr && fields.empty()) return values;
    for (const Field& field : fields_of(given)) {
        const std::string name = field.name == nullptr ? "" : field.name;
        if (name == "plugin_version" || name == "plugin_namespace") continue;
        size_t i = 0;
        while (i < fields.size() && name != fields[i].name) i++;
        if (i == fields.size()) throw PluginError("there is no field '" + name + "'");
        if (!std::isnan(values[i])) throw PluginError("field '" + name + "' is given twice");
        values[i] = read_number(field, fields[i].real);
        if (!(values[i] >= fields[i].low && values[i] <= fields[i].high)) {
            throw PluginError("field '" + name + "' is out of range");
        }
    }
    for (size_t i = 0; i < fields.size(); i++) {
        if (std::isnan(values[i])) throw PluginError(std::string("field '") + fields[i].name + "' is missing");
    }
    return values;
}

template <typename Kind>
std::vector<double> layer_values(const void* data, size_t size) {
    const std::string bytes(static_cast<const char*>(data), data == nullptr ? 0 : size);
    std::vector<double> values;
    const std::string begin = layer_data<Kind>({});
    if (bytes.compare(0, begin.size(), begin) == 0) {
        const char* at = bytes.c_str() + begin.size();
        for (char* end = nullptr; values.size() < Kind::fields().size(); at = end) {
            values.push_back(std::strtod(at, &end));
            if (end == at) break;
        }
    }
    // Written again it must be the same: neither cut off nor followed by anything.
    if (values.size() != Kind::fields().size() || layer_data<Kind>(values) != bytes) {
        throw PluginError("the engine's data for this plugin is '" + bytes + "', this library's begins with '" + begin +
                          "': build the engine again, or load the library of its release");
    }
    return values;
}

// Inputs, outputs: as layers.h says, all float16.
template <typename Kind>
class LayerV2 : public nvinfer1::IPluginV2DynamicExt {
  public:
    LayerV2(const std::string& layer, const std::vector<double>& values, bool from_engine,
            const std::string& plugin_namespace)
        : layer_(layer),
          values_(values),
          kind_(values),
          data_(layer_data<Kind>(values)),
          from_engine_(from_engine),
          namespace_(plugin_namespace) {}

    // ---- IPluginV2 ----

    const char* getPluginType() const noexcept override { return Kind::kName; }
    const char* getPluginVersion() const noexcept override { return kLayerVersion; }
    int32_t getNbOutputs() const noexcept override { return Kind::kOutputs; }

    int32_t initialize() noexcept override {
        return guard(1, [&] {
            if (from_engine_) kind_.prepare();
            return 0;
        });
    }
    void terminate() noexcept override {}

    size_t getSerializationSize() const noexcept override { return data_.size(); }
    void serialize(void* buffer) const noexcept override { std::memcpy(buffer, data_.data(), data_.size()); }
    void destroy() noexcept override { delete this; }

    void setPluginNamespace(const char* name) noexcept override {
        set_namespace(namespace_, name, layer_.c_str(), Kind::kName);
    }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

    // ---- IPluginV2Ext ----

    nvinfer1::DataType getOutputDataType(int32_t, const nvinfer1::DataType* inputs, int32_t) const noexcept override {
        return inputs[0];
    }

    // ---- IPluginV2DynamicExt ----

    nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
        return guard<nvinfer1::IPluginV2DynamicExt*>(
            nullptr, [&] { return new LayerV2(layer_, values_, from_engine_, namespace_); });
    }

    nvinfer1::DimsExprs getOutputDimensions(int32_t index, const nvinfer1::DimsExprs* inputs, int32_t,
                                            nvinfer1::IExprBuilder& builder) noexcept override {
        return guard(nvinfer1::DimsExprs{}, [&] { return kind_.output(index, inputs, builder); });
    }

    bool supportsFormatCombination(int32_t position, const nvinfer1::PluginTensorDesc* tensors, int32_t inputs,
                                   int32_t outputs) noexcept override {
        return inputs == Kind::kInputs && outputs == Kind::kOutputs &&
               tensors[position].type == nvinfer1::DataType::kHALF &&
               tensors[position].format == nvinfer1::TensorFormat::kLINEAR;
    }

    // It cannot refuse: what is wrong is said here, and enqueue fails.
    void configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                         const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override {
        guard(0, [&] {
            nvinfer1::Dims most[Kind::kInputs];
            for (int32_t i = 0; i < Kind::kInputs; i++) most[i] = inputs[i].max;
            kind_.check(most);
            return 0;
        });
    }

    size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                            int32_t) const noexcept override {
        return kind_.workspace_bytes();
    }

    int32_t enqueue(const nvinfer1::PluginTensorDesc* input_desc, const nvinfer1::PluginTensorDesc*,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override {
        if (!from_engine_) return 0;  // the builder's timing has nothing to choose from
        return guard(1, [&] {
            nvinfer1::Dims dims[Kind::kInputs];
            for (int32_t i = 0; i < Kind::kInputs; i++) dims[i] = input_desc[i].dims;
            kind_.check(dims);
            kind_.enqueue(dims, inputs, outputs, workspace, stream);
            return 0;
        });
    }

  private:
    template <typename Result, typename Call>
    Result guard(Result fallback, const Call& call) const noexcept {
        return guarded(layer_.c_str(), fallback, call, Kind::kName);
    }

    const std::string layer_;
    const std::vector<double> values_;
    const Kind kind_;
    const std::string data_;
    const bool from_engine_;
    std::string namespace_;
};

template <typename Kind>
class LayerCreatorV2 : public nvinfer1::IPluginCreator {
  public:
    nvinfer1::IPluginV2* createPlugin(const char* layer,
                                      const nvinfer1::PluginFieldCollection* fields) noexcept override {
        return create(layer, false, [&] { return layer_values<Kind>(fields); });
    }
    nvinfer1::IPluginV2* deserializePlugin(const char* layer, const void* data, size_t size) noexcept override {
        return create(layer, true, [&] { return layer_values<Kind>(data, size); });
    }

    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
        static const auto fields = [] {
            std::vector<nvinfer1::PluginField> all;
            for (const LayerField& field : Kind::fields()) {
                all.emplace_back(field.name, nullptr,
                                 field.real ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32,
                                 1);
            }
            return all;
        }();
        static const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
        return &collection;
    }
    const char* getPluginName() const noexcept override { return Kind::kName; }
    const char* getPluginVersion() const noexcept override { return kLayerVersion; }
    void setPluginNamespace(const char* name) noexcept override { set_namespace(namespace_, name, "", Kind::kName); }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

  private:
    template <typename Values>
    nvinfer1::IPluginV2* create(const char* layer, bool from_engine, const Values& values) const noexcept {
        return guarded<nvinfer1::IPluginV2*>(
            layer, nullptr,
            [&] { return new LayerV2<Kind>(layer == nullptr ? "" : layer, values(), from_engine, namespace_); },
            Kind::kName);
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

#endif  // SOCKET_TRT_TENSORRT_LAYER_V2_H_
