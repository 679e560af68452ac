#include "core.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>

namespace socket_trt {
namespace tensorrt {
namespace {

constexpr double kInt32Max = INT32_MAX;
constexpr double kFloatMax = std::numeric_limits<float>::max();

[[noreturn]] void fail(const char* format, ...) {
    char text[512];
    va_list values;
    va_start(values, format);
    std::vsnprintf(text, sizeof(text), format, values);
    va_end(values);
    throw PluginError(text);
}

// ---- Fields ----

const char* const kIgnoredFields[] = {"plugin_version", "plugin_namespace"};

const char* type_name(FieldType type) {
    switch (type) {
        case FieldType::kFloat32:
            return "float32";
        case FieldType::kFloat64:
            return "float64";
        case FieldType::kInt32:
            return "int32";
        case FieldType::kInt64:
            return "int64";
        case FieldType::kText:
            return "text";
        default:
            return "a type that no field has";
    }
}

template <typename T>
double read(const void* data) {
    T value;
    std::memcpy(&value, data, sizeof(T));  // a field's data need not be aligned
    return static_cast<double>(value);
}

}  // namespace

double read_number(const Field& field, bool real) {
    const bool type_fits = real ? field.type == FieldType::kFloat32 || field.type == FieldType::kFloat64
                                : field.type == FieldType::kInt32 || field.type == FieldType::kInt64;
    if (!type_fits) {
        fail("field '%s' is %s, expected %s", field.name, type_name(field.type),
             real ? "float32 or float64" : "int32 or int64");
    }
    if (field.length != 1) fail("field '%s' has %d values, expected 1", field.name, field.length);
    if (field.data == nullptr) fail("field '%s' has no data", field.name);
    switch (field.type) {
        case FieldType::kFloat32:
            return read<float>(field.data);
        case FieldType::kFloat64:
            return read<double>(field.data);
        case FieldType::kInt32:
            return read<int32_t>(field.data);
        default:
            return read<int64_t>(field.data);
    }
}

namespace {

void check_value(const AttributeSpec& spec, double value) {
    if (!(value >= spec.low && value <= spec.high)) {
        if (spec.high == kFloatMax) {
            if (spec.low == -kFloatMax) fail("field '%s' is %g, expected a finite number", spec.name, value);
            fail("field '%s' is %g, expected at least %g and finite", spec.name, value, spec.low);
        }
        fail("field '%s' is %.17g, expected %.17g to %.17g", spec.name, value, spec.low, spec.high);
    }
    const bool is_page_size = spec.integer == &Attributes::page_size;
    const auto whole = static_cast<int64_t>(value);
    if (is_page_size && (whole & (whole - 1)) != 0) {
        fail("field 'page_size' is %lld, expected a power of two", static_cast<long long>(whole));
    }
    if (spec.integer == &Attributes::sliding_window && whole == 0) {
        fail("field 'sliding_window' is 0, expected -1 (none) or at least 1");
    }
}

// ---- Tensors ----

const char* const kInputNames[kInputCount] = {"query",       "key",         "value",      "key_cache",
                                              "value_cache", "code_cache",  "norm_cache", "page_table",
                                              "past_length", "query_start", "planes"};

bool is_integer(int input) {
    return input == kCodeCache || input == kPageTable || input == kPastLength || input == kQueryStart;
}

const char* type_name(TensorType type) {
    switch (type) {
        case TensorType::kFloat16:
            return "float16";
        case TensorType::kBfloat16:
            return "bfloat16";
        case TensorType::kFloat32:
            return "float32";
        case TensorType::kInt32:
            return "int32";
        default:
            return "of another type";
    }
}

std::string shape_text(const int64_t* dims, int32_t rank) {
    std::string text = "[";
    for (int32_t i = 0; i < rank; i++) text += (i ? ", " : "") + std::to_string(dims[i]);
    return text + "]";
}

void check_rank(const Tensor* inputs, int input, int32_t rank) {
    if (inputs[input].rank != rank) {
        fail("%s is %s, expected %d dimensions", kInputNames[input],
             shape_text(inputs[input].dims, inputs[input].rank).c_str(), rank);
    }
}

constexpr int64_t kAny = -1;  // a dimension that is not compared

void check_shape(const Tensor* inputs, int input, std::initializer_list<int64_t> expected) {
    const Tensor& tensor = inputs[input];
    if (tensor.rank == static_cast<int32_t>(expected.size()) &&
        std::equal(expected.begin(), expected.end(), tensor.dims,
                   [](int64_t wanted, int64_t found) { return wanted == kAny || wanted == found; })) {
        return;
    }
    fail("%s is %s, expected %s (from the shapes of query, key_cache, page_table and planes)", kInputNames[input],
         shape_text(tensor.dims, tensor.rank).c_str(),
         shape_text(expected.begin(), static_cast<int32_t>(expected.size())).c_str());
}

int32_t size_of(const Tensor* inputs, int input, int dimension) {
    const int64_t size = inputs[input].dims[dimension];
    if (size < 0 || size > INT32_MAX) {
        fail("dimension %d of %s is %lld, expected 0 to 2^31 - 1", dimension, kInputNames[input],
             static_cast<long long>(size));
    }
    return static_cast<int32_t>(size);
}

size_t bytes_of(const Tensor& tensor) {
    size_t bytes = tensor.type == TensorType::kInt32 ? 4 : 2;
    for (int32_t i = 0; i < tensor.rank; i++) bytes *= static_cast<size_t>(tensor.dims[i]);
    return bytes;
}

// ---- The kernel library and the device ----

void check_status(int32_t status) {
    if (status != SOCKET_TRT_SUCCESS) fail("%s: %s", SocketTrtStatusText(status), SocketTrtLastError());
}

void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) fail("%s: %s", what, cudaGetErrorString(status));
}

// The current device; zeros where the machine has none.
BuildDevice current_device() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        (void)cudaGetLastError();  // the error is the answer: leave none behind for the application's own checks
        return BuildDevice{};
    }
    int ordinal = 0, major = 0, minor = 0, multiprocessors = 0;
    check_cuda(cudaGetDevice(&ordinal), "current device");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal), "compute capability");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal), "compute capability");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ordinal), "multiprocessors");
    return BuildDevice{major * 10 + minor, multiprocessors};
}

// The kernels take a workspace aligned to this; TensorRT promises nothing about the address it gives.
constexpr uintptr_t kWorkspaceAlignment = 256;

// ---- Serialised data ----
//
// Little-endian, as every platform of TensorRT is: a header of fixed size, the build device, then the attributes in
// the order of kAttributeSpecs, four bytes each.  A change of anything behind the header raises kFormat.

constexpr char kMagic[8] = {'S', 'o', 'c', 'k', 'e', 't', 'T', 'R'};
constexpr uint32_t kFormat = 1;

struct Header {
    char magic[8];
    uint32_t format;
    uint32_t size;  // of everything, header included
    char release[32];
};
static_assert(sizeof(Header) == 48, "the header has no padding");
static_assert(sizeof(SOCKET_TRT_RELEASE) <= sizeof(Header::release), "the release fits the header");
static_assert(sizeof(float) == 4 && sizeof(BuildDevice) == 8, "values are four bytes each");

constexpr size_t kSerializedBytes = sizeof(Header) + sizeof(BuildDevice) + 4 * kAttributeCount;

}  // namespace

const std::array<AttributeSpec, kAttributeCount> kAttributeSpecs = {{
    {"scale", &Attributes::scale, nullptr, true, -kFloatMax, kFloatMax},
    {"temperature", &Attributes::temperature, nullptr, true, std::numeric_limits<float>::min(), kFloatMax},
    {"sink", nullptr, &Attributes::sink, true, 0, kInt32Max},
    {"window", nullptr, &Attributes::window, true, 0, kInt32Max},
    {"budget_tokens", nullptr, &Attributes::budget_tokens, true, 0, kInt32Max},
    {"budget_permille", nullptr, &Attributes::budget_permille, true, 0, 1000},
    {"min_length", nullptr, &Attributes::min_length, true, 0, kInt32Max},
    {"selection", nullptr, &Attributes::selection, true, SOCKET_TRT_QUERY_HEAD, SOCKET_TRT_KV_HEAD},
    {"page_size", nullptr, &Attributes::page_size, true, 16, 256},
    {"sliding_window", nullptr, &Attributes::sliding_window, false, -1, kInt32Max},
    {"softcap", &Attributes::softcap, nullptr, false, 0, kFloatMax},
}};

bool supports(int position, const Tensor* tensors) {
    if (position < 0 || position >= kInputCount + kOutputCount || !tensors[position].linear) return false;
    const int input = position < kInputCount ? position : input_of_output(position - kInputCount);
    const TensorType type = tensors[position].type;
    if (is_integer(input)) return type == TensorType::kInt32;
    if (position != kQuery) return type == tensors[kQuery].type;
    return type == TensorType::kFloat16 || type == TensorType::kBfloat16;
}

void check_query_type(TensorType type) {
    if (type != TensorType::kFloat16 && type != TensorType::kBfloat16) {
        fail("query is %s, the kernels compute in float16 or bfloat16: export the model in one of these",
             type_name(type));
    }
}

AttentionPlugin AttentionPlugin::from_fields(const char* layer, const Field* fields, int32_t count) {
    if (count < 0 || (count > 0 && fields == nullptr)) fail("the field collection has %d fields and no data", count);
    AttentionPlugin plugin;
    plugin.layer_ = layer == nullptr ? "" : layer;
    bool seen[kAttributeCount] = {};
    for (int32_t i = 0; i < count; i++) {
        const Field& field = fields[i];
        if (field.name == nullptr) fail("field %d has no name", i);
        if (std::any_of(std::begin(kIgnoredFields), std::end(kIgnoredFields),
                        [&](const char* name) { return std::strcmp(field.name, name) == 0; })) {
            continue;
        }
        const auto spec = std::find_if(kAttributeSpecs.begin(), kAttributeSpecs.end(),
                                       [&](const AttributeSpec& s) { return std::strcmp(s.name, field.name) == 0; });
        if (spec == kAttributeSpecs.end()) {
            std::string known;
            for (const AttributeSpec& s : kAttributeSpecs) known += (known.empty() ? "" : ", ") + std::string(s.name);
            fail("field '%s' is unknown, expected some of %s", field.name, known.c_str());
        }
        if (seen[spec - kAttributeSpecs.begin()]) fail("field '%s' is given twice", field.name);
        seen[spec - kAttributeSpecs.begin()] = true;
        const double value = read_number(field, spec->real != nullptr);
        check_value(*spec, value);
        if (spec->real != nullptr) {
            plugin.attributes_.*spec->real = static_cast<float>(value);
        } else {
            plugin.attributes_.*spec->integer = static_cast<int32_t>(value);
        }
    }
    for (int i = 0; i < kAttributeCount; i++) {
        if (kAttributeSpecs[i].required && !seen[i]) {
            fail("field '%s' is missing, expected one %s", kAttributeSpecs[i].name,
                 kAttributeSpecs[i].real != nullptr ? "float32" : "int32");
        }
    }
    return plugin;
}

std::string AttentionPlugin::serialize() const {
    // An engine read and written again still has the workspace of the device it was built on.
    const BuildDevice device = built_on_.architecture != 0 ? built_on_ : current_device();
    Header header{};
    std::memcpy(header.magic, kMagic, sizeof(kMagic));
    header.format = kFormat;
    header.size = kSerializedBytes;
    std::memcpy(header.release, SOCKET_TRT_RELEASE, sizeof(SOCKET_TRT_RELEASE));
    std::string bytes(reinterpret_cast<const char*>(&header), sizeof(header));
    bytes.append(reinterpret_cast<const char*>(&device), sizeof(device));
    for (const AttributeSpec& spec : kAttributeSpecs) {
        const void* value = spec.real != nullptr ? static_cast<const void*>(&(attributes_.*spec.real))
                                                 : static_cast<const void*>(&(attributes_.*spec.integer));
        bytes.append(static_cast<const char*>(value), 4);
    }
    return bytes;
}

AttentionPlugin AttentionPlugin::from_bytes(const char* layer, const void* data, size_t size) {
    Header header;
    if (data == nullptr || size < sizeof(kMagic) || std::memcmp(data, kMagic, sizeof(kMagic)) != 0) {
        fail("the engine's data for this plugin (%zu bytes) is not SocketAttention's", size);
    }
    if (size < sizeof(header)) fail("the engine's data for this plugin is truncated: %zu bytes", size);
    std::memcpy(&header, data, sizeof(header));
    header.release[sizeof(header.release) - 1] = '\0';
    if (header.format != kFormat || std::strcmp(header.release, SOCKET_TRT_RELEASE) != 0) {
        fail(
            "the engine was built with plugin release %s (format %u), this library is %s (format %u): build the engine "
            "again, or load the library of its release",
            header.release, header.format, SOCKET_TRT_RELEASE, kFormat);
    }
    if (header.size != kSerializedBytes || size != kSerializedBytes) {
        fail("the engine's data for this plugin is damaged: %zu bytes, expected %zu", size, kSerializedBytes);
    }
    AttentionPlugin plugin;
    plugin.layer_ = layer == nullptr ? "" : layer;
    const char* next = static_cast<const char*>(data) + sizeof(header);
    std::memcpy(&plugin.built_on_, next, sizeof(plugin.built_on_));
    next += sizeof(plugin.built_on_);
    for (const AttributeSpec& spec : kAttributeSpecs) {
        if (spec.real != nullptr) {
            std::memcpy(&(plugin.attributes_.*spec.real), next, 4);
            check_value(spec, plugin.attributes_.*spec.real);
        } else {
            std::memcpy(&(plugin.attributes_.*spec.integer), next, 4);
            check_value(spec, plugin.attributes_.*spec.integer);
        }
        next += 4;
    }
    return plugin;
}

SocketTrtAttentionParams AttentionPlugin::params(const Tensor* inputs, bool exact) const {
    check_query_type(inputs[kQuery].type);
    for (int i = 0; i < kInputCount; i++) {
        const TensorType expected = is_integer(i) ? TensorType::kInt32 : inputs[kQuery].type;
        if (inputs[i].type != expected) {
            fail("%s is %s, expected %s", kInputNames[i], type_name(inputs[i].type), type_name(expected));
        }
    }
    constexpr int32_t kRanks[kInputCount] = {4, 4, 4, 4, 4, 4, 3, 2, 1, 1, 3};
    for (int i = 0; i < kInputCount; i++) check_rank(inputs, i, kRanks[i]);

    SocketTrtAttentionParams p{};
    p.struct_size = sizeof(p);
    p.dtype = inputs[kQuery].type == TensorType::kFloat16 ? SOCKET_TRT_FLOAT16 : SOCKET_TRT_BFLOAT16;
    p.tokens = size_of(inputs, kQuery, 2);
    p.query_heads = size_of(inputs, kQuery, 1);
    p.head_size = size_of(inputs, kQuery, 3);
    p.pages = size_of(inputs, kKeyCache, 0);
    p.kv_heads = size_of(inputs, kKeyCache, 1);
    p.page_size = attributes_.page_size;
    p.sequences = size_of(inputs, kPageTable, 0);
    p.pages_per_sequence = size_of(inputs, kPageTable, 1);
    p.tables = size_of(inputs, kPlanes, 0);
    p.planes_per_table = size_of(inputs, kPlanes, 1);

    const int64_t tokens = exact ? p.tokens : kAny, sequences = exact ? p.sequences : kAny;
    const int64_t pages = exact ? p.pages : kAny, boundaries = exact ? int64_t{p.sequences} + 1 : kAny;
    const int64_t code_words = int64_t{p.page_size} * (p.planes_per_table <= 8 ? 8 : 16) / 32;
    check_shape(inputs, kQuery, {1, p.query_heads, tokens, p.head_size});
    check_shape(inputs, kKey, {1, p.kv_heads, tokens, p.head_size});
    check_shape(inputs, kValue, {1, p.kv_heads, tokens, p.head_size});
    if (inputs[kKeyCache].dims[2] != p.page_size) {
        fail("key_cache has pages of %lld tokens, field 'page_size' is %d",
             static_cast<long long>(inputs[kKeyCache].dims[2]), p.page_size);
    }
    check_shape(inputs, kKeyCache, {pages, p.kv_heads, p.page_size, p.head_size});
    check_shape(inputs, kValueCache, {pages, p.kv_heads, p.page_size, p.head_size});
    check_shape(inputs, kCodeCache, {pages, p.kv_heads, p.tables, code_words});
    check_shape(inputs, kNormCache, {pages, p.kv_heads, p.page_size});
    check_shape(inputs, kPastLength, {sequences});
    check_shape(inputs, kQueryStart, {boundaries});
    check_shape(inputs, kPlanes, {p.tables, p.planes_per_table, p.head_size});

    p.scale = attributes_.scale;
    p.temperature = attributes_.temperature;
    p.sink = attributes_.sink;
    p.window = attributes_.window;
    p.budget_tokens = attributes_.budget_tokens;
    p.budget_permille = attributes_.budget_permille;
    p.min_length = attributes_.min_length;
    p.selection = attributes_.selection;
    p.sliding_window = attributes_.sliding_window;
    p.softcap = attributes_.softcap;
    return p;
}

void AttentionPlugin::check(const Tensor* inputs) const {
    const SocketTrtAttentionParams p = params(inputs, true);
    uint64_t bytes;
    check_status(SocketTrtAttentionWorkspace(&p, &bytes));
}

uint64_t AttentionPlugin::workspace_bytes(const Tensor* largest) const {
    SocketTrtAttentionParams p = params(largest, false);
    // Fewer queries are each split into more parts, so that a smaller batch may need more than the largest one: take
    // the most over all batch sizes.  More sequences than tokens change nothing.
    const int32_t sequences = std::max(1, std::min(p.sequences, p.tokens));
    uint64_t most = 0;
    for (p.sequences = 1; p.sequences <= sequences; p.sequences++) {
        uint64_t bytes;
        check_status(SocketTrtAttentionWorkspace(&p, &bytes));
        most = std::max(most, bytes);
    }
    return most + kWorkspaceAlignment - 1;
}

void AttentionPlugin::prepare() const {
    const BuildDevice device = current_device();
    if (device.architecture == 0) return;
    if (built_on_.architecture != 0 &&
        (device.architecture != built_on_.architecture || device.multiprocessors > built_on_.multiprocessors)) {
        fail(
            "the engine was built on a GPU of compute capability %d.%d with %d multiprocessors, this one has %d.%d and "
            "%d, which need more workspace: build the engine on this GPU",
            built_on_.architecture / 10, built_on_.architecture % 10, built_on_.multiprocessors,
            device.architecture / 10, device.architecture % 10, device.multiprocessors);
    }
    check_status(SocketTrtPrepare());
}

bool AttentionPlugin::enqueue(const Tensor* inputs, const void* const* input, void* const* output, void* workspace,
                              void* stream) const {
    SocketTrtAttentionParams p = params(inputs, true);
    // Two addresses for one cache are no error: TensorRT 8.6 gives a plugin buffers of its own while it builds, and a
    // caller that keeps inputs and outputs apart (as Polygraphy does) is right to expect its inputs untouched.
    bool copied = false;
    void* cache[kOutputCount] = {};
    for (int i = 1; i < kOutputCount; i++) {
        cache[i] = output[i];
        const int from = aliased_input(i);
        if (output[i] == input[from]) continue;
        check_cuda(cudaMemcpyAsync(output[i], input[from], bytes_of(inputs[from]), cudaMemcpyDeviceToDevice,
                                   static_cast<cudaStream_t>(stream)),
                   "copying a cache");
        copied = true;
    }
    p.query = input[kQuery];
    p.key = input[kKey];
    p.value = input[kValue];
    p.key_cache = cache[1];
    p.value_cache = cache[2];
    p.code_cache = cache[3];
    p.norm_cache = cache[4];
    p.page_table = static_cast<const int32_t*>(input[kPageTable]);
    p.past_length = static_cast<const int32_t*>(input[kPastLength]);
    p.query_start = static_cast<const int32_t*>(input[kQueryStart]);
    p.planes = input[kPlanes];
    p.output = output[0];
    const auto address = reinterpret_cast<uintptr_t>(workspace);
    p.workspace =
        reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment);
    // TensorRT does not say how much it gives: workspace_bytes() of the largest shapes, on the device of prepare().
    p.workspace_bytes = std::numeric_limits<uint64_t>::max();
    check_status(SocketTrtAttention(&p, stream));
    return copied;
}

std::string AttentionPlugin::describe() const {
    std::string text = "socket-trt " SOCKET_TRT_RELEASE;
    for (const AttributeSpec& spec : kAttributeSpecs) {
        char value[32];
        if (spec.real != nullptr) {
            std::snprintf(value, sizeof(value), "%.9g", static_cast<double>(attributes_.*spec.real));
        } else {
            std::snprintf(value, sizeof(value), "%d", attributes_.*spec.integer);
        }
        text += std::string(" ") + spec.name + "=" + value;
    }
    return text;
}

}  // namespace tensorrt
}  // namespace socket_trt
