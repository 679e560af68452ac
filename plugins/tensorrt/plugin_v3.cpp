// SocketAttention as an IPluginV3, for TensorRT 10 and 11.
#include "adapter.h"

static_assert(NV_TENSORRT_MAJOR >= 10, "IPluginV3OneBuildV2 needs TensorRT 10");

namespace socket_trt {
namespace tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorRTPhase;

// The one field of an engine: AttentionPlugin::serialize().
constexpr char kSerializedField[] = "serialized";

class SocketAttentionV3 : public nvinfer1::IPluginV3,
                          public nvinfer1::IPluginV3OneCore,
                          public nvinfer1::IPluginV3OneBuildV2,
                          public nvinfer1::IPluginV3OneRuntime {
  public:
    SocketAttentionV3(const AttentionPlugin& core, TensorRTPhase phase)
        : core_(core), phase_(phase), description_(core.describe()) {}
    SocketAttentionV3(const SocketAttentionV3& other) : SocketAttentionV3(other.core_, other.phase_) {}
    SocketAttentionV3& operator=(const SocketAttentionV3&) = delete;

    // ---- IPluginV3 ----

    nvinfer1::IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE:
                return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD:
                return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
            case PluginCapabilityType::kRUNTIME:
                return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override {
        return guarded<nvinfer1::IPluginV3*>(core_.layer(), nullptr, [&] { return new SocketAttentionV3(*this); });
    }

    // ---- IPluginV3OneCore ----

    const char* getPluginName() const noexcept override { return kPluginName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    // ---- IPluginV3OneBuildV2 ----

    int32_t getNbOutputs() const noexcept override { return kOutputCount; }

    int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                               int32_t input_count) const noexcept override {
        return guarded(core_.layer(), 1, [&] {
            check_counts(input_count, output_count);
            check_query_type(type_of(inputs[kQuery]));
            for (int i = 0; i < kOutputCount; i++) outputs[i] = inputs[input_of_output(i)];
            return 0;
        });
    }

    int32_t getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t, DimsExprs* outputs,
                            int32_t output_count, nvinfer1::IExprBuilder&) noexcept override {
        return guarded(core_.layer(), 1, [&] {
            check_counts(input_count, output_count);
            for (int i = 0; i < kOutputCount; i++) outputs[i] = inputs[input_of_output(i)];
            return 0;
        });
    }

    int32_t getAliasedInput(int32_t output) noexcept override { return aliased_input(output); }

    bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t input_count,
                                   int32_t output_count) noexcept override {
        if (position < 0 || position >= kInputCount + kOutputCount) return false;
        std::array<PluginTensorDesc, kInputCount + kOutputCount> desc;
        for (int32_t i = 0; i <= position; i++) desc[i] = tensors[i].desc;
        return supports_format(position, desc.data(), input_count, output_count);
    }

    int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count, const DynamicPluginTensorDesc*,
                            int32_t output_count) noexcept override {
        return guarded(core_.layer(), 1, [&] {
            check_counts(input_count, output_count);
            core_.workspace_bytes(inputs_of(inputs, input_count).data());
            return 0;
        });
    }

    size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t input_count, const DynamicPluginTensorDesc*,
                            int32_t) const noexcept override {
        return guarded(core_.layer(), size_t{0}, [&] {
            return static_cast<size_t>(core_.workspace_bytes(inputs_of(inputs, input_count).data()));
        });
    }

    const char* getTimingCacheID() noexcept override { return description_.c_str(); }
    const char* getMetadataString() noexcept override { return description_.c_str(); }

    // ---- IPluginV3OneRuntime ----

    int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t input_count, const PluginTensorDesc*,
                          int32_t output_count) noexcept override {
        return guarded(core_.layer(), 1, [&] {
            check_counts(input_count, output_count);
            core_.check(inputs_of(inputs, input_count).data());
            return 0;
        });
    }

    int32_t enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc*, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        // The builder times layers on buffers of no particular content: lengths and pages in them lead anywhere.
        if (phase_ == TensorRTPhase::kBUILD) return 0;
        return guarded(core_.layer(), 1, [&] {
            const Inputs tensors = inputs_of(input_desc, kInputCount);
            const bool copied = core_.enqueue(tensors.data(), inputs, outputs, workspace, stream);
            if (copied) warn_of_copied_caches(core_.layer());
            return 0;
        });
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
        return guarded<nvinfer1::IPluginV3*>(core_.layer(), nullptr, [&] {
            core_.prepare();
            return new SocketAttentionV3(*this);
        });
    }

    const PluginFieldCollection* getFieldsToSerialize() noexcept override {
        return guarded<const PluginFieldCollection*>(core_.layer(), nullptr, [&] {
            serialized_ = core_.serialize();
            field_ = PluginField(kSerializedField, serialized_.data(), PluginFieldType::kUNKNOWN,
                                 static_cast<int32_t>(serialized_.size()));
            collection_ = PluginFieldCollection{1, &field_};
            return &collection_;
        });
    }

  private:
    static void check_counts(int32_t inputs, int32_t outputs) {
        if (inputs != kInputCount || outputs != kOutputCount) {
            throw PluginError("the layer has " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
                              " outputs, expected " + std::to_string(kInputCount) + " and " +
                              std::to_string(kOutputCount));
        }
    }

    const AttentionPlugin core_;
    const TensorRTPhase phase_;
    const std::string description_;

    // What getFieldsToSerialize points to.
    std::string serialized_;
    PluginField field_;
    PluginFieldCollection collection_;
};

AttentionPlugin from_engine(const char* layer, const PluginFieldCollection* collection) {
    if (collection == nullptr || collection->nbFields != 1 || collection->fields == nullptr ||
        collection->fields[0].name == nullptr || collection->fields[0].length < 0 ||
        std::string(collection->fields[0].name) != kSerializedField) {
        throw PluginError(
            "the runtime phase takes the one field 'serialized' that this plugin gave to the engine: the engine was "
            "built with another plugin");
    }
    return AttentionPlugin::from_bytes(layer, collection->fields[0].data,
                                       static_cast<size_t>(collection->fields[0].length));
}

class SocketAttentionCreatorV3 : public nvinfer1::IPluginCreatorV3One {
  public:
    nvinfer1::IPluginV3* createPlugin(const char* layer, const PluginFieldCollection* fields,
                                      TensorRTPhase phase) noexcept override {
        return guarded<nvinfer1::IPluginV3*>(layer, nullptr, [&]() -> nvinfer1::IPluginV3* {
            if (phase == TensorRTPhase::kRUNTIME) return new SocketAttentionV3(from_engine(layer, fields), phase);
            const std::vector<Field> given = fields_of(fields);
            const auto core = AttentionPlugin::from_fields(layer, given.data(), static_cast<int32_t>(given.size()));
            return new SocketAttentionV3(core, phase);
        });
    }

    const PluginFieldCollection* getFieldNames() noexcept override { return advertised_fields(); }
    const char* getPluginName() const noexcept override { return kPluginName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
};

}  // namespace
}  // namespace tensorrt
}  // namespace socket_trt

SOCKET_TRT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static socket_trt::tensorrt::SocketAttentionCreatorV3 creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = socket_trt::tensorrt::creator_count(1);
    return creators;
}
