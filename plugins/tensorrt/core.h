// The SocketAttention plugin without TensorRT: what its adapters (plugin_v2.cpp, plugin_v3.cpp) share.
//
// An adapter turns TensorRT's structures into those below, calls `AttentionPlugin`, and reports what it throws through
// TensorRT's logger.  docs/plugin.md describes fields, shapes and serialised data.
#ifndef SOCKET_TRT_TENSORRT_CORE_H_
#define SOCKET_TRT_TENSORRT_CORE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "socket_trt/kernels.h"

namespace socket_trt {
namespace tensorrt {

constexpr char kPluginName[] = "SocketAttention";
constexpr char kPluginVersion[] = "1";
constexpr char kPluginNamespace[] = "socket";

// What a user can mend: the text says what is wrong and what is expected.  Never leaves an adapter.
class PluginError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A field of a plugin creator's collection; other types than these are refused.
enum class FieldType { kFloat32, kFloat64, kInt32, kInt64, kText, kOther };
struct Field {
    const char* name;
    const void* data;
    FieldType type;
    int32_t length;
};
// The value of a field that holds one real, or one integer.  Throws PluginError for any other.
double read_number(const Field& field, bool real);

// Attributes of one operator, as in socket_trt.config.OperatorAttributes.
struct Attributes {
    float scale = 0.f;
    float temperature = 0.f;
    int32_t sink = 0;
    int32_t window = 0;
    int32_t budget_tokens = 0;
    int32_t budget_permille = 0;
    int32_t min_length = 0;
    int32_t selection = 0;
    int32_t page_size = 0;
    int32_t sliding_window = -1;
    float softcap = 0.f;
};

// One attribute: a real or an integer, one of the two members is set.
struct AttributeSpec {
    const char* name;
    float Attributes::* real;
    int32_t Attributes::* integer;
    bool required;
    double low, high;  // inclusive
};
constexpr int kAttributeCount = 11;
extern const std::array<AttributeSpec, kAttributeCount> kAttributeSpecs;

enum Input {
    kQuery,
    kKey,
    kValue,
    kKeyCache,
    kValueCache,
    kCodeCache,
    kNormCache,
    kPageTable,
    kPastLength,
    kQueryStart,
    kPlanes,
    kInputCount
};
constexpr int kOutputCount = 5;  // the attention, then the four caches

// The input whose shape and type output `output` has.
constexpr int input_of_output(int output) {
    return output == 0 ? kQuery : kKeyCache + output - 1;
}
// The input that output `output` is written over; -1: none.
constexpr int aliased_input(int output) {
    return output >= 1 && output < kOutputCount ? input_of_output(output) : -1;
}

enum class TensorType { kFloat16, kBfloat16, kFloat32, kInt32, kOther };
struct Tensor {
    TensorType type = TensorType::kOther;
    bool linear = false;  // row-major, contiguous
    int32_t rank = 0;
    int64_t dims[8] = {};
};

// Whether the tensor at `position` (inputs, then outputs) can have its type and layout, given those before it.
bool supports(int position, const Tensor* tensors);

// Throws PluginError where the operator cannot compute in the type of its query.
void check_query_type(TensorType type);

// The device that an engine is built on; workspace is sized for it.  Zeros where there is none.
struct BuildDevice {
    int32_t architecture = 0;  // 90 for compute capability 9.0
    int32_t multiprocessors = 0;
};

class AttentionPlugin {
  public:
    // From the fields of a creator.  Throws PluginError for an unknown, missing, repeated, mistyped or out-of-range
    // one.
    static AttentionPlugin from_fields(const char* layer, const Field* fields, int32_t count);

    // From what serialize() gave.  Throws PluginError for data that is foreign, truncated or of another release.
    static AttentionPlugin from_bytes(const char* layer, const void* data, size_t size);

    std::string serialize() const;

    // Throws PluginError where the inputs of a step do not fit each other or the kernels do not compute them.
    void check(const Tensor* inputs) const;

    // Bytes that any step needs whose tokens, sequences and pages a sequence are at most those of `largest`, and a
    // check like check()'s of whatever is the same in every step: the largest shapes of a profile need not fit each
    // other.
    uint64_t workspace_bytes(const Tensor* largest) const;

    // Load the kernels for the current device, so that no later call does.  Does nothing where there is no device.
    void prepare() const;

    // Enqueue one step.  Caches whose output is not their input are copied first: returns whether any was.
    bool enqueue(const Tensor* inputs, const void* const* input, void* const* output, void* workspace,
                 void* stream) const;

    // Attributes and release in one line.
    std::string describe() const;

    const char* layer() const { return layer_.c_str(); }

  private:
    SocketTrtAttentionParams params(const Tensor* inputs, bool exact) const;

    Attributes attributes_;
    BuildDevice built_on_;  // of a deserialised plugin
    std::string layer_;
};

}  // namespace tensorrt
}  // namespace socket_trt

#endif  // SOCKET_TRT_TENSORRT_CORE_H_
