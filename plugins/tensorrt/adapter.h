// What both adapters need of TensorRT: its structures as the core's, its logger, and a barrier for exceptions.
//
// Included by one source file of each library: it defines the library's exported functions besides the creators.
#ifndef SOCKET_TRT_TENSORRT_ADAPTER_H_
#define SOCKET_TRT_TENSORRT_ADAPTER_H_

#include <NvInfer.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "core.h"
#include "socket_trt/plugin.h"

#define SOCKET_TRT_EXPORT extern "C" __attribute__((visibility("default")))

namespace socket_trt {
namespace tensorrt {
namespace {

// ---- Messages ----

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

// To the logger of the engine or context that is calling, to standard error where TensorRT has named none.
void log(nvinfer1::ILogger::Severity severity, const char* layer, const char* text,
         const char* plugin = kPluginName) noexcept {
    try {
        std::string message = plugin;
        if (layer != nullptr && *layer != '\0') message += std::string(" (") + layer + ")";
        message += std::string(": ") + text;
        nvinfer1::ILoggerFinder* finder = logger_finder.load();
        nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
        if (logger != nullptr) {
            logger->log(severity, message.c_str());
        } else if (severity <= nvinfer1::ILogger::Severity::kWARNING) {
            std::fprintf(stderr, "%s\n", message.c_str());
        }
    } catch (...) {  // a message is not worth a process
    }
}

// Runs `call` and returns what it returns; what it throws is logged and becomes `fallback`.
template <typename Result, typename Call>
Result guarded(const char* layer, Result fallback, const Call& call, const char* plugin = kPluginName) noexcept {
    try {
        return call();
    } catch (const std::exception& error) {
        log(nvinfer1::ILogger::Severity::kERROR, layer, error.what(), plugin);
    } catch (...) {
        log(nvinfer1::ILogger::Severity::kERROR, layer, "unknown exception", plugin);
    }
    return fallback;
}

// What setPluginNamespace does; null is the empty namespace.
inline void set_namespace(std::string& own, const char* name, const char* layer,
                          const char* plugin = kPluginName) noexcept {
    guarded(
        layer, 0,
        [&] {
            own = name == nullptr ? "" : name;
            return 0;
        },
        plugin);
}

// Once in a process: a runtime that binds 32 layers wrongly says so once.
void warn_of_copied_caches(const char* layer) noexcept {
    static std::atomic<bool> warned{false};
    if (warned.exchange(true)) return;
    log(nvinfer1::ILogger::Severity::kWARNING, layer,
        "a cache's output has another address than its input, so that whole caches are copied in every step: bind "
        "both to one address to update it in place");
}

// ---- The TensorRT that loads the library ----

// Major version of the TensorRT library that `object`'s class is from; 0 where that cannot be told.  TensorRT 11 put
// functions in front of those of ILogger and ILoggerFinder: the library for 10 would call the wrong ones, and the other
// way round.  Better no creator than a crash with the first message.
int32_t runtime_major(const void* object) {
    Dl_info info;
    const void* functions = *static_cast<const void* const*>(object);
    if (dladdr(functions, &info) == 0 || info.dli_fname == nullptr) return 0;
    void* library = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) return 0;
    const auto version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    // 8600 is 8.6.0, 101600 is 10.16.0.
    const int32_t number = version == nullptr ? 0 : version();
    dlclose(library);
    return number >= 100000 ? number / 10000 : number / 1000;
}

std::atomic<bool> wrong_runtime{false};

// How many of the library's creators to hand out.
int32_t creator_count(int32_t all) {
    return wrong_runtime ? 0 : all;
}

// ---- TensorRT's structures as the core's ----

TensorType type_of(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kHALF:
            return TensorType::kFloat16;
        case nvinfer1::DataType::kFLOAT:
            return TensorType::kFloat32;
        case nvinfer1::DataType::kINT32:
            return TensorType::kInt32;
#if NV_TENSORRT_MAJOR >= 10
        case nvinfer1::DataType::kBF16:
            return TensorType::kBfloat16;
#endif
        default:
            return TensorType::kOther;
    }
}

Tensor tensor_of(const nvinfer1::PluginTensorDesc& desc, const nvinfer1::Dims& dims) {
    Tensor tensor;
    tensor.type = type_of(desc.type);
    tensor.linear = desc.format == nvinfer1::TensorFormat::kLINEAR;
    tensor.rank = std::max(0, std::min<int32_t>(dims.nbDims, nvinfer1::Dims::MAX_DIMS));
    std::copy(dims.d, dims.d + tensor.rank, tensor.dims);
    return tensor;
}
Tensor tensor_of(const nvinfer1::PluginTensorDesc& desc) {
    return tensor_of(desc, desc.dims);
}
// The largest shape of the profile.
Tensor tensor_of(const nvinfer1::DynamicPluginTensorDesc& desc) {
    return tensor_of(desc.desc, desc.max);
}

using Inputs = std::array<Tensor, kInputCount>;

template <typename Desc>
Inputs inputs_of(const Desc* desc, int32_t count) {
    if (count != kInputCount || desc == nullptr) {
        throw PluginError("the layer has " + std::to_string(count) + " inputs, expected " +
                          std::to_string(kInputCount));
    }
    Inputs inputs;
    for (int i = 0; i < kInputCount; i++) inputs[i] = tensor_of(desc[i]);
    return inputs;
}

template <typename Desc>
bool supports_format(int32_t position, const Desc* desc, int32_t inputs, int32_t outputs) {
    if (inputs != kInputCount || outputs != kOutputCount || position < 0 || position >= kInputCount + kOutputCount) {
        return false;
    }
    Tensor tensors[kInputCount + kOutputCount];
    for (int i = 0; i <= position; i++) tensors[i] = tensor_of(desc[i]);  // those behind `position` are not yet valid
    return supports(position, tensors);
}

std::vector<Field> fields_of(const nvinfer1::PluginFieldCollection* collection) {
    if (collection == nullptr) throw PluginError("the field collection is null");
    if (collection->nbFields > 0 && collection->fields == nullptr) throw PluginError("the field collection is empty");
    std::vector<Field> fields;
    for (int32_t i = 0; i < collection->nbFields; i++) {
        const nvinfer1::PluginField& field = collection->fields[i];
        FieldType type = FieldType::kOther;
        switch (field.type) {
            case nvinfer1::PluginFieldType::kFLOAT32:
                type = FieldType::kFloat32;
                break;
            case nvinfer1::PluginFieldType::kFLOAT64:
                type = FieldType::kFloat64;
                break;
            case nvinfer1::PluginFieldType::kINT32:
                type = FieldType::kInt32;
                break;
            case nvinfer1::PluginFieldType::kCHAR:
                type = FieldType::kText;
                break;
#if NV_TENSORRT_MAJOR >= 10
            case nvinfer1::PluginFieldType::kINT64:
                type = FieldType::kInt64;
                break;
#endif
            default:
                break;
        }
        fields.push_back(Field{field.name, field.data, type, field.length});
    }
    return fields;
}

// The fields that a creator advertises: ONNX parsers look up attributes by these names.
const nvinfer1::PluginFieldCollection* advertised_fields() {
    static const auto fields = [] {
        std::array<nvinfer1::PluginField, kAttributeCount> all;
        for (int i = 0; i < kAttributeCount; i++) {
            const bool real = kAttributeSpecs[i].real != nullptr;
            all[i] = nvinfer1::PluginField(
                kAttributeSpecs[i].name, nullptr,
                real ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32, 1);
        }
        return all;
    }();
    static const nvinfer1::PluginFieldCollection collection{kAttributeCount, fields.data()};
    return &collection;
}

}  // namespace
}  // namespace tensorrt
}  // namespace socket_trt

SOCKET_TRT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    using namespace socket_trt::tensorrt;
    const int32_t major = finder == nullptr ? 0 : runtime_major(finder);
    wrong_runtime = major != 0 && major != NV_TENSORRT_MAJOR;
    logger_finder = wrong_runtime ? nullptr : finder;
    if (wrong_runtime) {
        std::fprintf(stderr,
                     "%s: this plugin library is for TensorRT %d, it was loaded by TensorRT %d: load "
                     "libsocket_trt_plugin_%d.so\n",
                     kPluginName, NV_TENSORRT_MAJOR, major, major);
    }
}

const char* SocketTrtPluginRelease(void) {
    return SOCKET_TRT_RELEASE;
}

int32_t SocketTrtPluginTensorRtMajor(void) {
    return NV_TENSORRT_MAJOR;
}

#endif  // SOCKET_TRT_TENSORRT_ADAPTER_H_
