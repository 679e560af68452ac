/* What a SocketAttention plugin library says of itself before any TensorRT loads it. */
#ifndef SOCKET_TRT_PLUGIN_H_
#define SOCKET_TRT_PLUGIN_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Release of socket-trt; an engine runs with the release that it was built with. */
__attribute__((visibility("default"))) const char* SocketTrtPluginRelease(void);

/* Major version of the TensorRT that the library is for: the layout of TensorRT's classes differs between majors. */
__attribute__((visibility("default"))) int32_t SocketTrtPluginTensorRtMajor(void);

/* The library for TensorRT 8.6 alone: 120901 where cuBLAS 12.9.1 is there to compute products, 0 where none is. */
__attribute__((visibility("default"))) int32_t SocketTrtPluginCublas(void);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* SOCKET_TRT_PLUGIN_H_ */
