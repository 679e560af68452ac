// A harness that does with a plugin what TensorRT does, in the same order, and checks every answer.
//
// harness.cpp is the program; v2.cpp and v3.cpp implement `Subject` for one plugin interface each.  A case file says
// what to create, one thing a line:
//
//     field scale float32 0.125           (float32, float64, int32, int64, text, none)
//     tensor query float16 1 4 33 64      the shape of a step
//     largest query 1 4 2048 64           the same at the profile's maximum, where that is more
#ifndef SOCKET_TRT_TENSORRT_HARNESS_H_
#define SOCKET_TRT_TENSORRT_HARNESS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace harness {

constexpr int kInputs = 11;
constexpr int kOutputs = 5;
extern const char* const kInputNames[kInputs];
extern const char* const kOutputNames[kOutputs];

// The input whose shape and type an output has, said here independently of the plugin.
constexpr int kTiedInput[kOutputs] = {0, 3, 4, 5, 6};

struct Field {
    std::string name;
    std::string type;
    std::vector<char> data;
    int32_t length = 1;
};

struct Tensor {
    std::string type;  // float16, bfloat16, float32, int32
    std::vector<int64_t> dims, largest;
    size_t bytes() const;
};

struct Case {
    std::vector<Field> fields;
    Tensor tensors[kInputs];
    bool has_tensors = false;
};

// Prints "ok what"; or "FAILED what" with what was logged, and ends the program with status 1.
void expect(bool fine, const std::string& what);

// What the plugin logged since the last call.
std::string take_log();
void record_log(int severity, const char* text);

// One plugin, through one interface.  Every walk_ method checks what it calls with expect().
class Subject {
  public:
    virtual ~Subject() = default;

    // Create for the build phase; false where the creator refuses.
    virtual bool create(const std::vector<Field>& fields) = 0;
    // What the creator advertises.
    virtual void walk_creator() = 0;
    // Build phase of the created plugin: clone, types, shapes, formats, configuration.
    virtual void walk_build(const Case& shapes) = 0;
    // Bytes at the largest shapes.
    virtual size_t workspace(const Case& shapes) = 0;
    virtual std::string serialize() = 0;
    // Replace the plugin by one for the runtime phase; false where the creator refuses.
    virtual bool recreate(const void* data, size_t size) = 0;
    // Get it ready for execution with these shapes; false where it refuses.
    virtual bool attach(const Case& shapes) = 0;
    virtual bool enqueue(const Case& shapes, const void* const* inputs, void* const* outputs, void* workspace,
                         cudaStream_t stream) = 0;
};

// `plugin`: the plugin library; `tensorrt`: a TensorRT runtime library whose registry shall load it, where wanted.
std::unique_ptr<Subject> open_subject(const std::string& plugin, const std::string& tensorrt);

}  // namespace harness

#endif  // SOCKET_TRT_TENSORRT_HARNESS_H_
