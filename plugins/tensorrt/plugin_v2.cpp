// SocketAttention as an IPluginV2DynamicExt, for TensorRT 8.6.
//
// This interface cannot alias an output to an input.  A caller that binds each cache's output to its input's address
// has it updated in place all the same; where the addresses differ the cache is copied first
// (AttentionPlugin::enqueue).
#include "adapter.h"
#include "layer_v2.h"

static_assert(NV_TENSORRT_MAJOR == 8, "later versions take plugin_v3.cpp");

namespace socket_trt {
namespace tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginTensorDesc;

class SocketAttentionV2 : public nvinfer1::IPluginV2DynamicExt {
  public:
    SocketAttentionV2(const AttentionPlugin& core, bool from_engine, const std::string& plugin_namespace)
        : core_(core), from_engine_(from_engine), namespace_(plugin_namespace) {}

    // ---- IPluginV2 ----

    const char* getPluginType() const noexcept override { return kPluginName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    int32_t getNbOutputs() const noexcept override { return kOutputCount; }

    int32_t initialize() noexcept override {
        return guarded(core_.layer(), 1, [&] {
            core_.prepare();
            return 0;
        });
    }
    void terminate() noexcept override {}

    size_t getSerializationSize() const noexcept override {
        return guarded(core_.layer(), size_t{0}, [&] { return core_.serialize().size(); });
    }
    void serialize(void* buffer) const noexcept override {
        guarded(core_.layer(), 0, [&] {
            const std::string bytes = core_.serialize();
            std::copy(bytes.begin(), bytes.end(), static_cast<char*>(buffer));
            return 0;
        });
    }
    void destroy() noexcept override { delete this; }

    void setPluginNamespace(const char* name) noexcept override { set_namespace(namespace_, name, core_.layer()); }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

    // ---- IPluginV2Ext ----

    DataType getOutputDataType(int32_t output, const DataType* inputs, int32_t) const noexcept override {
        return inputs[input_of_output(output)];
    }

    // ---- IPluginV2DynamicExt ----

    nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
        return guarded<nvinfer1::IPluginV2DynamicExt*>(
            core_.layer(), nullptr, [&] { return new SocketAttentionV2(core_, from_engine_, namespace_); });
    }

    nvinfer1::DimsExprs getOutputDimensions(int32_t output, const nvinfer1::DimsExprs* inputs, int32_t,
                                            nvinfer1::IExprBuilder&) noexcept override {
        return inputs[input_of_output(output)];
    }

    bool supportsFormatCombination(int32_t position, const PluginTensorDesc* tensors, int32_t input_count,
                                   int32_t output_count) noexcept override {
        return supports_format(position, tensors, input_count, output_count);
    }

    // It cannot refuse: what is wrong is said here, and enqueue fails.
    void configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count, const DynamicPluginTensorDesc*,
                         int32_t) noexcept override {
        guarded(core_.layer(), 0, [&] {
            core_.workspace_bytes(inputs_of(inputs, input_count).data());
            return 0;
        });
    }

    size_t getWorkspaceSize(const PluginTensorDesc* inputs, int32_t input_count, const PluginTensorDesc*,
                            int32_t) const noexcept override {
        return guarded(core_.layer(), size_t{0}, [&] {
            return static_cast<size_t>(core_.workspace_bytes(inputs_of(inputs, input_count).data()));
        });
    }

    int32_t enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc*, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        // The builder times layers on buffers of no particular content: lengths and pages in them lead anywhere.
        if (!from_engine_) return 0;
        return guarded(core_.layer(), 1, [&] {
            const Inputs tensors = inputs_of(input_desc, kInputCount);
            const bool copied = core_.enqueue(tensors.data(), inputs, outputs, workspace, stream);
            if (copied) warn_of_copied_caches(core_.layer());
            return 0;
        });
    }

  private:
    const AttentionPlugin core_;
    const bool from_engine_;
    std::string namespace_;
};

class SocketAttentionCreatorV2 : public nvinfer1::IPluginCreator {
  public:
    nvinfer1::IPluginV2* createPlugin(const char* layer, const PluginFieldCollection* fields) noexcept override {
        return create(layer, [&] {
            const std::vector<Field> given = fields_of(fields);
            const auto core = AttentionPlugin::from_fields(layer, given.data(), static_cast<int32_t>(given.size()));
            return new SocketAttentionV2(core, false, namespace_);
        });
    }
    nvinfer1::IPluginV2* deserializePlugin(const char* layer, const void* data, size_t size) noexcept override {
        return create(layer, [&] {
            return new SocketAttentionV2(AttentionPlugin::from_bytes(layer, data, size), true, namespace_);
        });
    }

    const PluginFieldCollection* getFieldNames() noexcept override { return advertised_fields(); }
    const char* getPluginName() const noexcept override { return kPluginName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    void setPluginNamespace(const char* name) noexcept override { set_namespace(namespace_, name, ""); }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

  private:
    template <typename Call>
    static nvinfer1::IPluginV2* create(const char* layer, const Call& call) noexcept {
        return guarded<nvinfer1::IPluginV2*>(layer, nullptr, call);
    }

    std::string namespace_ = kPluginNamespace;
};

}  // namespace
}  // namespace tensorrt
}  // namespace socket_trt

SOCKET_TRT_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
    using namespace socket_trt::tensorrt;
    static SocketAttentionCreatorV2 attention;
    static LayerCreatorV2<Linear> linear;
    static LayerCreatorV2<RmsNorm> norm;
    static LayerCreatorV2<AddRmsNorm> add_norm;
    static LayerCreatorV2<SplitRotary> rotary;
    static LayerCreatorV2<SwiGlu> gate;
    static nvinfer1::IPluginCreator* const creators[] = {&attention, &linear, &norm, &add_norm, &rotary, &gate};
    count = creator_count(static_cast<int32_t>(std::size(creators)));
    return creators;
}
