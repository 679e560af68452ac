// The life cycle of an IPluginV3, created by the registry of a real TensorRT 10 or 11 runtime where one is named.
#include <cstring>

#include "tensorrt.h"

namespace harness {
namespace {

using nvinfer1::PluginCapabilityType;
using nvinfer1::TensorRTPhase;

class Finder : public nvinfer1::ILoggerFinder {
  public:
    nvinfer1::ILogger* findLogger() override { return &logger_; }

  private:
    Logger logger_;
};

class SubjectV3 : public Subject {
  public:
    SubjectV3(const std::string& path, const std::string& tensorrt) {
        void* library = open_library(path);
        check_library(library);
        nvinfer1::IPluginCreatorInterface* found = nullptr;
        if (tensorrt.empty()) {
            const auto creators =
                find_function<nvinfer1::IPluginCreatorInterface* const*(int32_t&)>(library, "getCreators");
            int32_t count = 0;
            nvinfer1::IPluginCreatorInterface* const* all = creators(count);
            expect(count == 1 && all != nullptr, "the library has one creator");
            found = all[0];
        } else {
            void* runtime = open_library(tensorrt);
            expect(find_function<int32_t()>(runtime, "getInferLibMajorVersion")() == NV_TENSORRT_MAJOR,
                   "the runtime is of this major of TensorRT");
            nvinfer1::IPluginRegistry* registry =
                find_function<nvinfer1::IPluginRegistry*()>(runtime, "getPluginRegistry")();
            expect(registry != nullptr, "the runtime has a registry");
            expect(registry->loadLibrary(path.c_str()) != nullptr, "the registry loads the library");
            found = registry->getCreator("SocketAttention", "1", "socket");
        }
        expect(found != nullptr, "the creator is found");
        expect(std::string(found->getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE", "it is an IPluginCreatorV3One");
        creator_ = static_cast<nvinfer1::IPluginCreatorV3One*>(found);
        // The registry has set a finder of its own, which knows no logger before there is a runtime object (and that
        // needs a GPU); from here on messages are wanted here.
        static Finder finder;
        find_function<void(nvinfer1::ILoggerFinder*)>(library, "setLoggerFinder")(&finder);
    }

    bool create(const std::vector<Field>& fields) override {
        const auto given = fields_of(fields);
        const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(given.size()), given.data()};
        plugin_.reset(creator_->createPlugin("layer", &collection, TensorRTPhase::kBUILD));
        return plugin_ != nullptr;
    }

    void walk_creator() override {
        expect(std::string(creator_->getPluginName()) == "SocketAttention", "the creator's name");
        expect(std::string(creator_->getPluginVersion()) == "1", "the creator's version");
        expect(std::string(creator_->getPluginNamespace()) == "socket", "the creator's namespace");
        check_advertised(creator_->getFieldNames());
        for (const TensorRTPhase phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) {
            expect(creator_->createPlugin("layer", nullptr, phase) == nullptr, "no collection is refused");
        }
        const nvinfer1::PluginFieldCollection empty{0, nullptr};
        take_log();
        expect(creator_->createPlugin("layer", &empty, TensorRTPhase::kRUNTIME) == nullptr,
               "the runtime phase refuses fields that no engine holds");
        expect(take_log().find("the one field 'serialized'") != std::string::npos, "and says which it takes");
    }

    void walk_build(const Case& shapes) override {
        std::unique_ptr<nvinfer1::IPluginV3> copy(plugin_->clone());
        expect(copy != nullptr && copy != plugin_, "the plugin is cloned");
        plugin_ = std::move(copy);
        auto* core = capability<nvinfer1::IPluginV3OneCore>(PluginCapabilityType::kCORE, "PLUGIN_V3ONE_CORE", 1);
        expect(std::string(core->getPluginName()) == "SocketAttention", "the plugin's name");
        expect(std::string(core->getPluginVersion()) == "1", "the plugin's version");
        expect(std::string(core->getPluginNamespace()) == "socket", "the plugin's namespace");

        auto* build = this->build();
        expect(build->getNbOutputs() == kOutputs, "five outputs");
        std::vector<nvinfer1::DataType> types, found(kOutputs);
        for (const Tensor& tensor : shapes.tensors) types.push_back(data_type(tensor.type));
        expect(build->getOutputDataTypes(found.data(), kOutputs, types.data(), kInputs) == 0, "output types are known");
        std::vector<std::unique_ptr<Expression>> owner;
        const auto dims = expressions_of(shapes, owner);
        std::vector<nvinfer1::DimsExprs> results(kOutputs);
        ExpressionBuilder builder;
        expect(build->getOutputShapes(dims.data(), kInputs, nullptr, 0, results.data(), kOutputs, builder) == 0,
               "output shapes are known");
        for (int i = 0; i < kOutputs; i++) {
            const int tied = kTiedInput[i];
            expect(found[i] == types[tied], std::string("type of output ") + kOutputNames[i]);
            expect(same_dims(results[i], shapes.tensors[tied]), std::string("shape of output ") + kOutputNames[i]);
            expect(build->getAliasedInput(i) == (i == 0 ? -1 : tied),
                   std::string("alias of output ") + kOutputNames[i]);
        }
        take_log();
        types[0] = nvinfer1::DataType::kFLOAT;
        expect(build->getOutputDataTypes(found.data(), kOutputs, types.data(), kInputs) != 0, "float32 is refused");
        expect(take_log().find("query is float32") != std::string::npos, "float32 is named");
        expect(build->getOutputDataTypes(found.data(), kOutputs, types.data(), kInputs - 1) != 0,
               "a missing input is refused");

        check_formats(shapes, [&](int position, const std::vector<nvinfer1::PluginTensorDesc>& descs) {
            std::vector<nvinfer1::DynamicPluginTensorDesc> dynamic(descs.size());
            for (size_t i = 0; i < descs.size(); i++) dynamic[i].desc = descs[i];
            return build->supportsFormatCombination(position, dynamic.data(), kInputs, kOutputs);
        });
        take_log();
        expect(configure(shapes), "the configuration is accepted");
        Case other = shapes;
        other.tensors[0].largest[3] = other.tensors[0].dims[3] = 80;
        expect(!configure(other), "a configuration that does not fit is refused");
        expect(take_log().find("80") != std::string::npos, "and named");
        expect(std::strstr(build->getMetadataString(), "page_size=") != nullptr, "the metadata holds the attributes");
        expect(build->getTimingCacheID() != nullptr, "timings can be cached");
        expect(build->getNbTactics() == 0, "no tactics of its own");
    }

    size_t workspace(const Case& shapes) override {
        expect(configure(shapes), "the configuration is accepted");
        const auto profile = profile_of(shapes);
        return build()->getWorkspaceSize(profile.data(), kInputs, profile.data() + kInputs, kOutputs);
    }

    std::string serialize() override {
        const nvinfer1::PluginFieldCollection* fields = runtime()->getFieldsToSerialize();
        if (fields == nullptr || fields->nbFields != 1) return "";
        const nvinfer1::PluginField& field = fields->fields[0];
        field_name_ = field.name;
        field_type_ = field.type;
        return std::string(static_cast<const char*>(field.data), static_cast<size_t>(field.length));
    }

    bool recreate(const void* data, size_t size) override {
        const nvinfer1::PluginField field(field_name_.c_str(), data, field_type_, static_cast<int32_t>(size));
        const nvinfer1::PluginFieldCollection collection{1, &field};
        std::unique_ptr<nvinfer1::IPluginV3> made(
            creator_->createPlugin("layer", &collection, TensorRTPhase::kRUNTIME));
        if (made == nullptr) return false;
        plugin_ = std::move(made);
        return true;
    }

    bool attach(const Case& shapes) override {
        std::unique_ptr<nvinfer1::IPluginV3> attached(runtime()->attachToContext(nullptr));
        if (attached == nullptr) return false;
        plugin_ = std::move(attached);
        expect(runtime()->setTactic(0) == 0, "the default tactic is taken");
        const auto descs = descs_of(shapes, false);
        return runtime()->onShapeChange(descs.data(), kInputs, descs.data() + kInputs, kOutputs) == 0;
    }

    bool enqueue(const Case& shapes, const void* const* inputs, void* const* outputs, void* workspace,
                 cudaStream_t stream) override {
        const auto descs = descs_of(shapes, false);
        return runtime()->enqueue(descs.data(), descs.data() + kInputs, inputs, outputs, workspace, stream) == 0;
    }

  private:
    template <typename Capability>
    Capability* capability(PluginCapabilityType type, const char* kind, int32_t major) {
        nvinfer1::IPluginCapability* found = plugin_->getCapabilityInterface(type);
        if (found == nullptr || std::string(found->getInterfaceInfo().kind) != kind ||
            found->getInterfaceInfo().major != major) {
            expect(false, std::string("the plugin has the capability ") + kind + " " + std::to_string(major));
        }
        return static_cast<Capability*>(found);
    }
    nvinfer1::IPluginV3OneBuildV2* build() {
        return capability<nvinfer1::IPluginV3OneBuildV2>(PluginCapabilityType::kBUILD, "PLUGIN_V3ONE_BUILD", 2);
    }
    nvinfer1::IPluginV3OneRuntime* runtime() {
        return capability<nvinfer1::IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME", 1);
    }
    bool configure(const Case& shapes) {
        const auto profile = profile_of(shapes);
        return build()->configurePlugin(profile.data(), kInputs, profile.data() + kInputs, kOutputs) == 0;
    }

    nvinfer1::IPluginCreatorV3One* creator_;
    std::unique_ptr<nvinfer1::IPluginV3> plugin_;
    std::string field_name_ = "serialized";
    nvinfer1::PluginFieldType field_type_ = nvinfer1::PluginFieldType::kUNKNOWN;
};

}  // namespace

std::unique_ptr<Subject> open_subject(const std::string& plugin, const std::string& tensorrt) {
    return std::unique_ptr<Subject>(new SubjectV3(plugin, tensorrt));
}

}  // namespace harness
