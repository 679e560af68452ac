// The life cycle of Linear, the second plugin of the library for TensorRT 8.6.
#ifndef SOCKET_TRT_TENSORRT_HARNESS_LINEAR_H_
#define SOCKET_TRT_TENSORRT_HARNESS_LINEAR_H_

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

// Without cuBLAS 12 or a GPU, up to what it says of them.
inline void walk_linear(nvinfer1::IPluginCreator* creator) {
    expect(creator != nullptr, "Linear: its creator is found");
    expect(std::string(creator->getPluginName()) == "Linear", "Linear: the creator's name");
    expect(creator->getFieldNames()->nbFields == 0, "Linear: no fields");
    struct Destroy {
        void operator()(nvinfer1::IPluginV2* plugin) const { plugin->destroy(); }
    };
    using Plugin = std::unique_ptr<nvinfer1::IPluginV2DynamicExt, Destroy>;
    const auto owned = [](nvinfer1::IPluginV2* plugin) {
        return Plugin(static_cast<nvinfer1::IPluginV2DynamicExt*>(plugin));
    };
    const Plugin plugin = owned(creator->createPlugin("product", nullptr));
    expect(plugin != nullptr && plugin->getNbOutputs() == 1, "Linear: created, with one output");
    expect(std::string(plugin->getPluginNamespace()) == "socket", "Linear: the plugin's namespace");

    const Expression tokens(kTokens), columns(kColumns), rows(kRows);
    nvinfer1::DimsExprs dims[2];
    dims[0].nbDims = dims[1].nbDims = 2;
    dims[0].d[0] = &tokens;
    dims[0].d[1] = dims[1].d[1] = &columns;
    dims[1].d[0] = &rows;
    ExpressionBuilder builder;
    const nvinfer1::DimsExprs output = plugin->getOutputDimensions(0, dims, 2, builder);
    expect(output.nbDims == 2 && output.d[0] == &tokens && output.d[1] == &rows, "Linear: shape of the output");

    std::vector<nvinfer1::PluginTensorDesc> descs;
    for (const auto& shape : {std::vector<int64_t>{kTokens, kColumns}, {kRows, kColumns}, {kTokens, kRows}}) {
        Tensor tensor;
        tensor.type = "float16";
        tensor.dims = shape;
        descs.push_back(desc_of(tensor, false));
    }
    for (int i = 0; i < 3; i++) {
        expect(plugin->supportsFormatCombination(i, descs.data(), 2, 1), "Linear: takes float16");
        auto other = descs;
        other[i].type = nvinfer1::DataType::kFLOAT;
        expect(!plugin->supportsFormatCombination(i, other.data(), 2, 1), "Linear: takes nothing but float16");
    }
    take_log();
    std::vector<nvinfer1::DynamicPluginTensorDesc> profile;
    for (const auto& desc : descs) profile.push_back({desc, desc.dims, desc.dims});
    plugin->configurePlugin(profile.data(), 2, profile.data() + 2, 1);
    expect(take_log().empty(), "Linear: operands that fit are accepted");
    profile[1].max.d[1]--;
    plugin->configurePlugin(profile.data(), 2, profile.data() + 2, 1);
    expect(take_log().find("columns") != std::string::npos, "Linear: operands that do not fit are named");
    expect(plugin->initialize() == 0, "Linear: building needs no cuBLAS");

    std::string data(plugin->getSerializationSize(), '\0');
    plugin->serialize(&data[0]);
    const Plugin again = owned(creator->deserializePlugin("product", data.data(), data.size()));
    expect(again != nullptr, "Linear: made again from its data");
    const Plugin clone = owned(again->clone());
    expect(clone != nullptr && clone->getSerializationSize() == data.size(), "Linear: cloned");
    const std::string foreign = data + "1";
    expect(creator->deserializePlugin("product", foreign.data(), foreign.size()) == nullptr &&
               take_log().find(foreign) != std::string::npos,
           "Linear: data of another release is refused");
    if (clone->initialize() == 0) {
        multiply(clone.get(), descs);
    } else {
        const std::string log = take_log();
        expect(log.find("Linear (product): ") != std::string::npos &&
                   (log.find("cuBLAS") != std::string::npos || log.find("CUDA") != std::string::npos),
               "Linear: a product without cuBLAS or GPU says so");
    }
}

}  // namespace
}  // namespace harness

#endif  // SOCKET_TRT_TENSORRT_HARNESS_LINEAR_H_
