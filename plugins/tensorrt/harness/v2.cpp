// The life cycle of an IPluginV2DynamicExt, as TensorRT 8.6 runs it; created by its registry where one is named.
#include <cstring>

#include "layers.h"
#include "tensorrt.h"

namespace harness {
namespace {

class Finder : public nvinfer1::ILoggerFinder {
  public:
    nvinfer1::ILogger* findLogger() override { return &logger_; }

  private:
    Logger logger_;
};

class SubjectV2 : public Subject {
  public:
    SubjectV2(const std::string& path, const std::string& tensorrt) {
        void* library = open_library(path);
        check_library(library);
        if (tensorrt.empty()) {
            const auto creators =
                find_function<nvinfer1::IPluginCreator* const*(int32_t&)>(library, "getPluginCreators");
            int32_t count = 0;
            nvinfer1::IPluginCreator* const* all = creators(count);
            expect(count == 6 && all != nullptr, "the library has six creators");
            creator_ = all[0];
            layers_.assign(all + 1, all + count);
        } else {
            void* runtime = open_library(tensorrt);
            nvinfer1::IPluginRegistry* registry =
                find_function<nvinfer1::IPluginRegistry*()>(runtime, "getPluginRegistry")();
            expect(registry != nullptr, "the runtime has a registry");
            expect(registry->loadLibrary(path.c_str()) != nullptr, "the registry loads the library");
            creator_ = registry->getPluginCreator("SocketAttention", "1", "socket");
            expect(creator_ != nullptr, "the creator is found");
            for (const LayerCase& layer : layer_cases()) {
                layers_.push_back(registry->getPluginCreator(layer.name.c_str(), "1", "socket"));
            }
        }
        static Finder finder;
        find_function<void(nvinfer1::ILoggerFinder*)>(library, "setLoggerFinder")(&finder);
    }
    ~SubjectV2() override { replace(nullptr); }

    bool create(const std::vector<Field>& fields) override {
        const auto given = fields_of(fields);
        const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(given.size()), given.data()};
        replace(creator_->createPlugin("layer", &collection));
        return plugin_ != nullptr;
    }

    void walk_creator() override {
        expect(std::string(creator_->getPluginName()) == "SocketAttention", "the creator's name");
        expect(std::string(creator_->getPluginVersion()) == "1", "the creator's version");
        expect(std::string(creator_->getPluginNamespace()) == "socket", "the creator's namespace");
        check_advertised(creator_->getFieldNames());
        expect(creator_->createPlugin("layer", nullptr) == nullptr, "no collection is refused");
        creator_->setPluginNamespace("other");
        expect(std::string(creator_->getPluginNamespace()) == "other", "the creator's namespace can be set");
        creator_->setPluginNamespace("socket");
        take_log();
        const auto layers = layer_cases();
        for (size_t i = 0; i < layers.size(); i++) walk_layer(layers_[i], layers[i]);
    }

    void walk_build(const Case& shapes) override {
        nvinfer1::IPluginV2DynamicExt* original = plugin_;
        plugin_ = original->clone();
        expect(plugin_ != nullptr && plugin_ != original, "the plugin is cloned");
        original->destroy();
        expect(std::string(plugin_->getPluginType()) == "SocketAttention", "the plugin's type");
        expect(std::string(plugin_->getPluginVersion()) == "1", "the plugin's version");
        expect(std::string(plugin_->getPluginNamespace()) == "socket", "the plugin's namespace");
        expect(plugin_->getNbOutputs() == kOutputs, "five outputs");

        std::vector<nvinfer1::DataType> types;
        for (const Tensor& tensor : shapes.tensors) types.push_back(data_type(tensor.type));
        std::vector<std::unique_ptr<Expression>> owner;
        const auto dims = expressions_of(shapes, owner);
        ExpressionBuilder builder;
        for (int i = 0; i < kOutputs; i++) {
            const int tied = kTiedInput[i];
            expect(plugin_->getOutputDataType(i, types.data(), kInputs) == types[tied],
                   std::string("type of output ") + kOutputNames[i]);
            expect(same_dims(plugin_->getOutputDimensions(i, dims.data(), kInputs, builder), shapes.tensors[tied]),
                   std::string("shape of output ") + kOutputNames[i]);
        }
        check_formats(shapes, [&](int position, const std::vector<nvinfer1::PluginTensorDesc>& descs) {
            return plugin_->supportsFormatCombination(position, descs.data(), kInputs, kOutputs);
        });
        configure(shapes);
        expect(take_log().empty(), "the configuration is accepted");
        Case other = shapes;
        other.tensors[0].largest[3] = other.tensors[0].dims[3] = 80;
        configure(other);
        expect(take_log().find("80") != std::string::npos, "a configuration that does not fit is named");
        configure(shapes);
    }

    size_t workspace(const Case& shapes) override {
        configure(shapes);
        const auto descs = descs_of(shapes, true);
        return plugin_->getWorkspaceSize(descs.data(), kInputs, descs.data() + kInputs, kOutputs);
    }

    std::string serialize() override {
        std::string data(plugin_->getSerializationSize(), '\0');
        plugin_->serialize(&data[0]);
        return data;
    }

    bool recreate(const void* data, size_t size) override {
        auto* made = creator_->deserializePlugin("layer", data, size);
        if (made == nullptr) return false;
        made->setPluginNamespace("socket");
        replace(made);
        return true;
    }

    // TensorRT 8.6 asks nothing before enqueue that could refuse shapes: the configuration logs what is wrong.
    bool attach(const Case& shapes) override {
        if (plugin_->initialize() != 0) return false;
        take_log();
        Case exact = shapes;
        for (Tensor& tensor : exact.tensors) tensor.largest = tensor.dims;
        configure(exact);
        const std::string log = take_log();
        if (!log.empty()) record_log(0, log.c_str());
        return log.empty();
    }

    bool enqueue(const Case& shapes, const void* const* inputs, void* const* outputs, void* workspace,
                 cudaStream_t stream) override {
        const auto descs = descs_of(shapes, false);
        return plugin_->enqueue(descs.data(), descs.data() + kInputs, inputs, outputs, workspace, stream) == 0;
    }

  private:
    void configure(const Case& shapes) {
        const auto profile = profile_of(shapes);
        plugin_->configurePlugin(profile.data(), kInputs, profile.data() + kInputs, kOutputs);
    }
    void replace(nvinfer1::IPluginV2* plugin) {
        if (plugin_ != nullptr) {
            plugin_->terminate();
            plugin_->destroy();
        }
        plugin_ = static_cast<nvinfer1::IPluginV2DynamicExt*>(plugin);
    }

    nvinfer1::IPluginCreator* creator_ = nullptr;
    std::vector<nvinfer1::IPluginCreator*> layers_;  // in the order of layer_cases
    nvinfer1::IPluginV2DynamicExt* plugin_ = nullptr;
};

}  // namespace

std::unique_ptr<Subject> open_subject(const std::string& plugin, const std::string& tensorrt) {
    return std::unique_ptr<Subject>(new SubjectV2(plugin, tensorrt));
}

}  // namespace harness
