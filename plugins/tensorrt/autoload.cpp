// libsocket_trt_autoload_<major>.so: opening it loads the plugin library beside it into the registry of the TensorRT
// that the process has loaded.  For tools that only open plugin libraries and expect these to register themselves, as
// Polygraphy's --plugins and trtexec's --staticPlugins do.
//
// The plugin library cannot do so itself: TensorRT opens it while it holds its registry, which would be entered twice.
#include <NvInfer.h>
#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>
#include <string>

namespace {

// Path of the first loaded library whose file name begins with `data`'s.
struct Search {
    const char* prefix;
    std::string path;
};
int visit(dl_phdr_info* info, size_t, void* data) {
    auto* search = static_cast<Search*>(data);
    const char* slash = std::strrchr(info->dlpi_name, '/');
    const char* name = slash == nullptr ? info->dlpi_name : slash + 1;
    if (std::strncmp(name, search->prefix, std::strlen(search->prefix)) != 0) return 0;
    search->path = info->dlpi_name;
    return 1;
}

// What prevented it; empty where the plugin is registered.
std::string load() {
    const std::string major = std::to_string(NV_TENSORRT_MAJOR);
    void* tensorrt = nullptr;
    for (const std::string name : {"libnvinfer.so.", "libnvinfer_lean.so."}) {
        const std::string prefix = name + major;
        Search search{prefix.c_str(), ""};
        if (tensorrt == nullptr && dl_iterate_phdr(visit, &search) != 0) {
            tensorrt = dlopen(search.path.c_str(), RTLD_NOW | RTLD_NOLOAD);
        }
    }
    // Polygraphy opens plugins before it imports TensorRT: open what it will find loaded.
    for (const std::string name : {"libnvinfer.so.", "libnvinfer_lean.so."}) {
        if (tensorrt == nullptr) tensorrt = dlopen((name + major).c_str(), RTLD_NOW);
    }
    if (tensorrt == nullptr) {
        return "TensorRT " + major + " is neither loaded nor on LD_LIBRARY_PATH (libnvinfer.so." + major + ")";
    }
    void* get_registry = dlsym(tensorrt, "getPluginRegistry");
    if (get_registry == nullptr) return "this TensorRT " + major + " has no plugin registry";
    nvinfer1::IPluginRegistry* registry = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(get_registry)();

    Dl_info self;
    if (dladdr(reinterpret_cast<const void*>(&visit), &self) == 0) return "it does not find itself";
    const std::string own = self.dli_fname;
    const size_t slash = own.rfind('/');
    const std::string plugin = (slash == std::string::npos ? std::string() : own.substr(0, slash + 1)) +
                               "libsocket_trt_plugin_" + major + ".so";
    if (registry == nullptr || registry->loadLibrary(plugin.c_str()) == nullptr) {
        return "TensorRT's registry does not load " + plugin;
    }
    return "";
}

__attribute__((constructor)) void on_open() {
    const std::string problem = load();
    if (!problem.empty()) std::fprintf(stderr, "libsocket_trt_autoload: %s\n", problem.c_str());
}

}  // namespace
