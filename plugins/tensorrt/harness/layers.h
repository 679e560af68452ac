// The life cycle of the plugins for what lies around attention, which the library for TensorRT 8.6 has.
#ifndef SOCKET_TRT_TENSORRT_HARNESS_LAYERS_H_
#define SOCKET_TRT_TENSORRT_HARNESS_LAYERS_H_

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tensorrt.h"

namespace harness {
namespace {

constexpr int kTokens = 3, kColumns = 64, kRows = 40;

// The numbers of a product of small integers, which float16 holds and float32 sums exactly.
inline int activation(int token, int column) {
    return (token + 3 * column) % 5 - 2;
}
inline int weight(int row, int column) {
    return (7 * row + column) % 3 - 1;
}

inline uint16_t half_of(int value) {
    static const uint16_t bits[] = {0xC000, 0xBC00, 0x0000, 0x3C00, 0x4000};  // -2 ... 2
    return bits[value + 2];
}
inline double value_of(uint16_t half) {  // of a finite number
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    return half >> 15 != 0 ? -size : size;
}

// One product on the GPU.
inline void multiply(nvinfer1::IPluginV2DynamicExt* plugin, const std::vector<nvinfer1::PluginTensorDesc>& descs) {
    std::vector<uint16_t> host[] = {{}, {}, std::vector<uint16_t>(kTokens * kRows, 0x7E00)};  // of the output: NaN
    for (int t = 0; t < kTokens; t++) {
        for (int c = 0; c < kColumns; c++) host[0].push_back(half_of(activation(t, c)));
    }
    for (int r = 0; r < kRows; r++) {
        for (int c = 0; c < kColumns; c++) host[1].push_back(half_of(weight(r, c)));
    }
    void* device[3];
    for (int i = 0; i < 3; i++) {
        const size_t bytes = 2 * host[i].size();
        expect(cudaMalloc(&device[i], bytes) == cudaSuccess, "the GPU has memory");
        cudaMemcpy(device[i], host[i].data(), bytes, cudaMemcpyHostToDevice);
    }
    void* workspace = nullptr;
    cudaMalloc(&workspace, plugin->getWorkspaceSize(descs.data(), 2, descs.data() + 2, 1));
    const void* const inputs[] = {device[0], device[1]};
    expect(plugin->enqueue(descs.data(), descs.data() + 2, inputs, device + 2, workspace, nullptr) == 0,
           "Linear: a product is enqueued");
    expect(cudaMemcpy(host[2].data(), device[2], 2 * host[2].size(), cudaMemcpyDeviceToHost) == cudaSuccess,
           "Linear: a product is computed");
    bool right = true;
    for (int t = 0; t < kTokens; t++) {
        for (int r = 0; r < kRows; r++) {
            int sum = 0;
            for (int c = 0; c < kColumns; c++) sum += activation(t, c) * weight(r, c);
            right = right && value_of(host[2][t * kRows + r]) == sum;
        }
    }
    expect(right, "Linear: a product of integers is exact");
    for (void* memory : device) cudaFree(memory);
    cudaFree(workspace);
}

struct Destroy {
    void operator()(nvinfer1::IPluginV2* plugin) const { plugin->destroy(); }
};
using LayerPlugin = std::unique_ptr<nvinfer1::IPluginV2DynamicExt, Destroy>;
inline LayerPlugin owned(nvinfer1::IPluginV2* plugin) {
    return LayerPlugin(static_cast<nvinfer1::IPluginV2DynamicExt*>(plugin));
}

template <typename T>
Field number(const std::string& name, const std::string& type, T value) {
    const char* const bytes = reinterpret_cast<const char*>(&value);
    return Field{name, type, std::vector<char>(bytes, bytes + sizeof(T)), 1};
}

// A layer, its attributes, and shapes that fit each other.
struct LayerCase {
    std::string name;
    std::vector<Field> fields;
    std::vector<std::vector<int64_t>> inputs, outputs;
};
inline std::vector<LayerCase> layer_cases() {
    const std::vector<Field> norm = {number("epsilon", "float32", 1e-5f), number<int32_t>("plus_one", "int32", 1)};
    const std::vector<Field> heads = {number<int32_t>("query_heads", "int32", 4),
                                      number<int32_t>("kv_heads", "int32", 2)};
    return {
        {"Linear", {}, {{kTokens, kColumns}, {kRows, kColumns}}, {{kTokens, kRows}}},
        {"RMSNorm", norm, {{1, kTokens, 4, kColumns}, {kColumns}}, {{1, kTokens, 4, kColumns}}},
        {"AddRMSNorm",
         norm,
         {{kTokens, kColumns}, {kTokens, kColumns}, {kColumns}},
         {{kTokens, kColumns}, {kTokens, kColumns}}},
        {"SplitRotary",
         heads,
         {{kTokens, 8 * 16}, {kTokens, 16}, {kTokens, 16}},
         {{1, 4, kTokens, 16}, {1, 2, kTokens, 16}, {1, 2, kTokens, 16}}},
        {"SwiGLU", {}, {{kTokens, 2 * kColumns}}, {{kTokens, kColumns}}},
    };
}

inline LayerPlugin create_layer(nvinfer1::IPluginCreator* creator, const std::vector<Field>& fields) {
    const auto given = fields_of(fields);
    const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(given.size()), given.data()};
    return owned(creator->createPlugin("layer", &collection));
}

inline void walk_layer_fields(nvinfer1::IPluginCreator* creator, const LayerCase& layer) {
    const nvinfer1::PluginFieldCollection* advertised = creator->getFieldNames();
    bool same = advertised->nbFields == static_cast<int32_t>(layer.fields.size());
    for (int32_t i = 0; same && i < advertised->nbFields; i++)
        same = advertised->fields[i].name == layer.fields[i].name;
    expect(same, layer.name + ": its fields");
    auto fields = layer.fields;
    fields.push_back(number<int32_t>("other", "int32", 1));
    expect(create_layer(creator, fields) == nullptr && take_log().find("'other'") != std::string::npos,
           layer.name + ": an unknown field is refused");
    for (size_t i = 0; i < layer.fields.size(); i++) {
        const std::string name = layer.fields[i].name;
        const auto refused = [&](const std::vector<Field>& changed, const std::string& why) {
            const bool created = create_layer(creator, changed) != nullptr;
            expect(!created && take_log().find("'" + name + "'") != std::string::npos,
                   layer.name + ": " + name + why + " is refused");
        };
        fields = layer.fields;
        fields.erase(fields.begin() + i);
        refused(fields, " that is missing");
        fields = layer.fields;
        fields.push_back(fields[i]);
        refused(fields, " given twice");
        fields = layer.fields;
        fields[i] = number(name, "float64", -1.);
        if (fields[i].type != layer.fields[i].type) refused(fields, " out of range or of another type");
    }
}

inline void walk_layer_shapes(nvinfer1::IPluginV2DynamicExt* plugin, const LayerCase& layer) {
    std::vector<std::vector<Expression>> numbers;
    std::vector<nvinfer1::DimsExprs> dims;
    for (const auto& shape : layer.inputs) numbers.emplace_back(shape.begin(), shape.end());
    for (const auto& shape : numbers) {
        nvinfer1::DimsExprs one;
        one.nbDims = static_cast<int32_t>(shape.size());
        for (size_t i = 0; i < shape.size(); i++) one.d[i] = &shape[i];
        dims.push_back(one);
    }
    const int32_t inputs = static_cast<int32_t>(layer.inputs.size()), outputs = plugin->getNbOutputs();
    ExpressionBuilder builder;
    bool right = outputs == static_cast<int32_t>(layer.outputs.size());
    for (int32_t i = 0; right && i < outputs; i++) {
        const nvinfer1::DimsExprs output = plugin->getOutputDimensions(i, dims.data(), inputs, builder);
        right = output.nbDims == static_cast<int32_t>(layer.outputs[i].size());
        for (int32_t d = 0; right && d < output.nbDims; d++) {
            right = output.d[d]->getConstantValue() == layer.outputs[i][d];
        }
    }
    expect(right, layer.name + ": shapes of the outputs");

    std::vector<nvinfer1::PluginTensorDesc> descs;
    for (const auto& shapes : {layer.inputs, layer.outputs}) {
        for (const auto& shape : shapes) {
            Tensor tensor;
            tensor.type = "float16";
            tensor.dims = shape;
            descs.push_back(desc_of(tensor, false));
        }
    }
    for (int32_t i = 0; i < inputs + outputs; i++) {
        expect(plugin->supportsFormatCombination(i, descs.data(), inputs, outputs), layer.name + ": takes float16");
        auto other = descs;
        other[i].type = nvinfer1::DataType::kFLOAT;
        expect(!plugin->supportsFormatCombination(i, other.data(), inputs, outputs),
               layer.name + ": takes nothing but float16");
    }
    take_log();
    std::vector<nvinfer1::DynamicPluginTensorDesc> profile;
    for (const auto& desc : descs) profile.push_back({desc, desc.dims, desc.dims});
    plugin->configurePlugin(profile.data(), inputs, profile.data() + inputs, outputs);
    expect(take_log().empty(), layer.name + ": inputs that fit are accepted");
    profile[0].max.d[profile[0].max.nbDims - 1]--;
    plugin->configurePlugin(profile.data(), inputs, profile.data() + inputs, outputs);
    expect(take_log().find("expected") != std::string::npos, layer.name + ": inputs that do not fit are named");
}

inline void walk_layer_data(nvinfer1::IPluginCreator* creator, nvinfer1::IPluginV2DynamicExt* plugin,
                            const LayerCase& layer) {
    std::string data(plugin->getSerializationSize(), '\0');
    plugin->serialize(&data[0]);
    for (size_t size = 0; size < data.size(); size++) {
        const LayerPlugin cut = owned(creator->deserializePlugin("layer", data.data(), size));
        std::string again = data;
        if (cut != nullptr) cut->serialize(&again[0]);
        expect(cut == nullptr, layer.name + ": data cut off is refused");
    }
    take_log();
    const std::string foreign = data + "1.";
    expect(creator->deserializePlugin("layer", foreign.data(), foreign.size()) == nullptr &&
               take_log().find(foreign) != std::string::npos,
           layer.name + ": data of another release is refused");
    const LayerPlugin again = owned(creator->deserializePlugin("layer", data.data(), data.size()));
    expect(again != nullptr, layer.name + ": made again from its data");
    const LayerPlugin clone = owned(again->clone());
    std::string cloned(clone == nullptr ? 0 : clone->getSerializationSize(), '\0');
    if (clone != nullptr) clone->serialize(&cloned[0]);
    expect(cloned == data, layer.name + ": cloned with its attributes");
    if (clone->initialize() != 0) {
        const std::string log = take_log();
        expect(log.find(layer.name + " (layer): ") != std::string::npos &&
                   (log.find("cuBLAS") != std::string::npos || log.find("CUDA") != std::string::npos),
               layer.name + ": says that there is no cuBLAS or GPU");
    } else if (layer.name == "Linear") {
        std::vector<nvinfer1::PluginTensorDesc> descs;
        for (const auto& shape : {layer.inputs[0], layer.inputs[1], layer.outputs[0]}) {
            Tensor tensor;
            tensor.type = "float16";
            tensor.dims = shape;
            descs.push_back(desc_of(tensor, false));
        }
        multiply(clone.get(), descs);
    }
}

// Without a GPU, up to what a layer says of it; with one a product, by cuBLAS where that is there.
inline void walk_layer(nvinfer1::IPluginCreator* creator, const LayerCase& layer) {
    expect(creator != nullptr, layer.name + ": its creator is found");
    expect(std::string(creator->getPluginName()) == layer.name, layer.name + ": the creator's name");
    take_log();
    const LayerPlugin plugin = create_layer(creator, layer.fields);
    expect(plugin != nullptr, layer.name + ": created");
    expect(std::string(plugin->getPluginNamespace()) == "socket", layer.name + ": the plugin's namespace");
    expect(plugin->initialize() == 0, layer.name + ": building needs neither cuBLAS nor GPU");
    walk_layer_fields(creator, layer);
    walk_layer_shapes(plugin.get(), layer);
    walk_layer_data(creator, plugin.get(), layer);
}

}  // namespace
}  // namespace harness

#endif  // SOCKET_TRT_TENSORRT_HARNESS_LAYERS_H_
