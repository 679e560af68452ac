// plugin_harness_<major> COMMAND --plugin LIBRARY [--tensorrt LIBRARY] --case FILE [...]
//
//   create      creates the plugin from the case's fields and prints what it logs; status 3 where it is refused
//   walk        the whole life cycle up to execution, no GPU needed
//   workspace   prints the bytes of workspace at the case's largest shapes
//   run         executes one step: --data DIRECTORY holds <input>.bin, --output DIRECTORY gets <output>.bin and
//               workspace.bin; --separate keeps caches apart from their outputs, --graph captures and replays it
#include "harness.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>

namespace harness {

const char* const kInputNames[kInputs] = {"query",       "key",         "value",      "key_cache",
                                          "value_cache", "code_cache",  "norm_cache", "page_table",
                                          "past_length", "query_start", "planes"};
const char* const kOutputNames[kOutputs] = {"output", "key_cache", "value_cache", "code_cache", "norm_cache"};

namespace {

std::string logged;

template <typename T>
std::vector<char> bytes_of(T value) {
    const char* begin = reinterpret_cast<const char*>(&value);
    return std::vector<char>(begin, begin + sizeof(value));
}

Field read_field(std::istringstream& words) {
    Field field;
    words >> field.name >> field.type;
    std::string word;
    field.length = 0;
    while (words >> word) {
        std::vector<char> data;
        if (field.type == "float32") data = bytes_of(std::strtof(word.c_str(), nullptr));
        if (field.type == "float64") data = bytes_of(std::strtod(word.c_str(), nullptr));
        if (field.type == "int32") data = bytes_of(static_cast<int32_t>(std::strtol(word.c_str(), nullptr, 10)));
        if (field.type == "int64") data = bytes_of(static_cast<int64_t>(std::strtoll(word.c_str(), nullptr, 10)));
        if (field.type == "text") data.assign(word.begin(), word.end());
        field.data.insert(field.data.end(), data.begin(), data.end());
        field.length += field.type == "text" ? static_cast<int32_t>(data.size()) : 1;
    }
    return field;
}

int input_index(const std::string& name) {
    for (int i = 0; i < kInputs; i++) {
        if (name == kInputNames[i]) return i;
    }
    expect(false, "the case names an input of the operator: " + name);
    return -1;
}

Case read_case(const std::string& path) {
    std::ifstream file(path);
    expect(file.good(), "the case file opens: " + path);
    Case result;
    std::string line;
    while (std::getline(file, line)) {
        std::istringstream words(line);
        std::string kind, name;
        if (!(words >> kind)) continue;
        if (kind == "field") {
            result.fields.push_back(read_field(words));
            continue;
        }
        words >> name;
        Tensor& tensor = result.tensors[input_index(name)];
        if (kind == "tensor") words >> tensor.type;
        std::vector<int64_t>& dims = kind == "tensor" ? tensor.dims : tensor.largest;
        dims.assign(std::istream_iterator<int64_t>(words), {});
        result.has_tensors = true;
    }
    for (Tensor& tensor : result.tensors) {
        if (tensor.largest.empty()) tensor.largest = tensor.dims;
    }
    return result;
}

void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) expect(false, std::string(what) + ": " + cudaGetErrorString(status));
}

std::vector<char> read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    expect(file.good(), "the file opens: " + path);
    return std::vector<char>(std::istreambuf_iterator<char>(file), {});
}

// Device memory behind which 1 MiB of a pattern shows whether anybody wrote past the end.
class Buffer {
  public:
    static constexpr size_t kGuard = size_t{1} << 20;
    static constexpr int kPattern = 0xA5;

    Buffer(size_t bytes, int fill) : bytes_(bytes) {
        check_cuda(cudaMalloc(reinterpret_cast<void**>(&data_), bytes + kGuard), "cudaMalloc");
        check_cuda(cudaMemset(data_, fill, bytes), "cudaMemset");
        check_cuda(cudaMemset(data_ + bytes, kPattern, kGuard), "cudaMemset");
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { cudaFree(data_); }

    void* data() const { return data_; }

    void write(const std::vector<char>& from) {
        expect(from.size() == bytes_,
               "a data file has " + std::to_string(bytes_) + " bytes, it has " + std::to_string(from.size()));
        check_cuda(cudaMemcpy(data_, from.data(), bytes_, cudaMemcpyHostToDevice), "copy to the device");
    }
    std::vector<char> read() const {
        std::vector<char> all(bytes_ + kGuard);
        check_cuda(cudaMemcpy(all.data(), data_, all.size(), cudaMemcpyDeviceToHost), "copy from the device");
        for (size_t i = bytes_; i < all.size(); i++) {
            if (static_cast<unsigned char>(all[i]) != kPattern) expect(false, "nothing is written past a buffer's end");
        }
        all.resize(bytes_);
        return all;
    }
    void save(const std::string& path) const {
        const std::vector<char> all = read();
        std::ofstream file(path, std::ios::binary);
        file.write(all.data(), static_cast<std::streamsize>(all.size()));
        expect(file.good(), "the result is written: " + path);
    }

  private:
    char* data_ = nullptr;
    size_t bytes_;
};

struct Options {
    std::string command, plugin, tensorrt, case_file, data, output;
    bool separate = false, graph = false;
};

Options parse(int argc, char** argv) {
    Options options;
    if (argc > 1) options.command = argv[1];
    const struct {
        const char* name;
        std::string* to;
    } values[] = {{"--plugin", &options.plugin},
                  {"--tensorrt", &options.tensorrt},
                  {"--case", &options.case_file},
                  {"--data", &options.data},
                  {"--output", &options.output}};
    for (int i = 2; i < argc; i++) {
        const std::string word = argv[i];
        bool known = word == "--separate" || word == "--graph";
        options.separate = options.separate || word == "--separate";
        options.graph = options.graph || word == "--graph";
        for (const auto& value : values) {
            if (word == value.name && i + 1 < argc) {
                *value.to = argv[++i];
                known = true;
            }
        }
        if (!known) {
            std::fprintf(stderr, "unknown option or missing value: %s\n", word.c_str());
            std::exit(2);
        }
    }
    if (options.plugin.empty() || options.case_file.empty()) {
        std::fprintf(stderr, "usage: %s create|walk|workspace|run --plugin LIBRARY --case FILE\n", argv[0]);
        std::exit(2);
    }
    return options;
}

int create(Subject& subject, const Case& shapes) {
    const bool created = subject.create(shapes.fields);
    std::printf("%s", take_log().c_str());
    std::printf("%s\n", created ? "created" : "refused");
    return created ? 0 : 3;
}

// A refusal with a message in the log that holds `message`.
void expect_refused(Subject& subject, const std::string& data, const std::string& message, const std::string& what) {
    take_log();
    expect(!subject.recreate(data.data(), data.size()), what + " is refused");
    const std::string text = take_log();
    expect(text.find(message) != std::string::npos, what + " is refused with '" + message + "', logged: " + text);
}

int walk(Subject& subject, const Case& shapes) {
    expect(shapes.has_tensors, "the case has tensors");
    subject.walk_creator();
    expect(subject.create(shapes.fields), "the plugin is created");
    subject.walk_build(shapes);
    expect(subject.workspace(shapes) > 0, "workspace is needed");

    const std::string data = subject.serialize();
    expect(!data.empty(), "the plugin serialises");
    expect(subject.serialize() == data, "the same plugin serialises to the same bytes");
    for (size_t size = 0; size < data.size(); size++) {
        if (subject.recreate(data.data(), size)) expect(false, "truncated data is refused at every length");
    }
    take_log();
    expect_refused(subject, data.substr(0, 40), "truncated", "a header cut short");
    expect_refused(subject, data.substr(0, data.size() - 1), "damaged", "data cut short");
    expect_refused(subject, data + '\0', "damaged", "data with something behind it");
    expect_refused(subject, std::string(data.size(), 'x'), "is not SocketAttention's", "foreign data");
    std::string changed = data;
    changed[8]++;
    expect_refused(subject, changed, "(format 2), this library is", "data of another format");
    changed = data;
    changed[16] = '9';
    expect_refused(subject, changed, "build the engine again", "data of another release");
    changed = data;
    std::memset(&changed[changed.size() - 12], 0, 4);  // page_size, sliding_window, softcap
    expect_refused(subject, changed, "field 'page_size' is 0", "a value out of range");

    expect(subject.recreate(data.data(), data.size()), "the plugin is recreated from its data");
    expect(subject.serialize() == data, "the recreated plugin serialises to the same bytes");
    expect(subject.attach(shapes), "the plugin attaches");
    Case mismatched = shapes;
    mismatched.tensors[3].dims[2] *= 2;
    expect(!subject.attach(mismatched), "pages of another size are refused");
    expect(take_log().find("field 'page_size' is") != std::string::npos, "pages of another size are named");
    const void* inputs[kInputs] = {};
    void* outputs[kOutputs] = {};
    expect(!subject.enqueue(shapes, inputs, outputs, nullptr, nullptr), "null pointers are refused");
    expect(take_log().find("query is null") != std::string::npos, "null pointers are named");
    std::printf("life cycle complete\n");
    return 0;
}

int run(Subject& subject, const Case& shapes, const Options& options) {
    expect(subject.create(shapes.fields), "the plugin is created");
    const size_t workspace_bytes = subject.workspace(shapes);
    expect(workspace_bytes > 0, "workspace is known");
    const std::string data = subject.serialize();
    std::string elsewhere = data;
    for (const int offset : {48, 52}) {  // the architecture and multiprocessors that the engine was built on
        const int32_t one = 1;
        std::memcpy(&elsewhere[offset], &one, sizeof(one));
    }
    expect(subject.recreate(elsewhere.data(), elsewhere.size()), "a plugin from another GPU's engine is recreated");
    expect(!subject.attach(shapes), "a plugin from another GPU's engine does not attach");
    expect(take_log().find("build the engine on this GPU") != std::string::npos, "and says why");
    expect(subject.recreate(data.data(), data.size()), "the plugin is recreated");
    expect(subject.attach(shapes), "the plugin attaches");

    std::unique_ptr<Buffer> input[kInputs], output[kOutputs];
    const void* inputs[kInputs];
    void* outputs[kOutputs];
    for (int i = 0; i < kInputs; i++) {
        input[i].reset(new Buffer(shapes.tensors[i].bytes(), 0));
        input[i]->write(read_file(options.data + "/" + kInputNames[i] + ".bin"));
        inputs[i] = input[i]->data();
    }
    for (int i = 0; i < kOutputs; i++) {
        const int tied = kTiedInput[i];
        if (i == 0 || options.separate) {
            output[i].reset(new Buffer(shapes.tensors[tied].bytes(), 0xFF));  // NaN
        }
        outputs[i] = output[i] ? output[i]->data() : input[tied]->data();
    }
    Buffer workspace(workspace_bytes, Buffer::kPattern);
    cudaStream_t stream;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
    check_cuda(cudaDeviceSynchronize(), "inputs");
    if (options.graph) {  // the first call of all: nothing may load kernels while the stream is captured
        cudaGraph_t graph;
        cudaGraphExec_t executable;
        check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture begins");
        const bool enqueued = subject.enqueue(shapes, inputs, outputs, workspace.data(), stream);
        check_cuda(cudaStreamEndCapture(stream, &graph), "capture ends");
        expect(enqueued, "the plugin enqueues into a graph");
        check_cuda(cudaGraphInstantiate(&executable, graph, 0), "the graph");
        for (int i = 0; i < 2; i++) check_cuda(cudaGraphLaunch(executable, stream), "the graph's launch");
    } else {
        expect(subject.enqueue(shapes, inputs, outputs, workspace.data(), stream), "the plugin enqueues");
    }
    check_cuda(cudaStreamSynchronize(stream), "execution");

    for (int i = 0; i < kOutputs; i++) {
        const Buffer& result = output[i] ? *output[i] : *input[kTiedInput[i]];
        result.save(options.output + "/" + kOutputNames[i] + ".bin");
        if (i > 0 && options.separate) {
            const int tied = kTiedInput[i];
            expect(input[tied]->read() == read_file(options.data + "/" + kInputNames[tied] + ".bin"),
                   std::string("a cache kept apart is left as it was: ") + kInputNames[tied]);
        }
    }
    workspace.save(options.output + "/workspace.bin");
    std::printf("%sdone\n", take_log().c_str());
    return 0;
}

}  // namespace

size_t Tensor::bytes() const {
    size_t bytes = type == "float32" || type == "int32" ? 4 : 2;
    for (const int64_t dim : dims) bytes *= static_cast<size_t>(dim);
    return bytes;
}

void expect(bool fine, const std::string& what) {
    std::printf("%s %s\n", fine ? "ok" : "FAILED", what.c_str());
    if (!fine) std::printf("%s", take_log().c_str());
    std::fflush(stdout);
    if (!fine) std::exit(1);
}

void record_log(int severity, const char* text) {
    logged += "log " + std::to_string(severity) + " " + text + "\n";
}

std::string take_log() {
    std::string text;
    std::swap(text, logged);
    return text;
}

}  // namespace harness

int main(int argc, char** argv) {
    using namespace harness;
    const Options options = parse(argc, argv);
    const Case shapes = read_case(options.case_file);
    const std::unique_ptr<Subject> subject = open_subject(options.plugin, options.tensorrt);
    if (options.command == "create") return create(*subject, shapes);
    if (options.command == "walk") return walk(*subject, shapes);
    if (options.command == "run") return run(*subject, shapes, options);
    if (options.command == "workspace") {
        expect(subject->create(shapes.fields), "the plugin is created");
        const size_t bytes = subject->workspace(shapes);
        std::printf("%s%zu\n", take_log().c_str(), bytes);
        return 0;
    }
    std::fprintf(stderr, "unknown command: %s\n", options.command.c_str());
    return 2;
}
