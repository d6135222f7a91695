// The part of the CUDA runtime that TVM's calls, over the simulated driver (`driver.cc`).
#include <cstddef>
#include <cstdlib>
#include <cstring>

extern "C" {
void* sim_allocate(std::size_t);
int sim_release(void*);
void sim_memcpy(void*, void*, const void*, std::size_t);
int sim_begin_capture(void*);
void* sim_end_capture();
void* sim_copy_graph(void*);
void sim_free_graph(void*);
void sim_launch_graph(void*);
int sim_devices();
int sim_attribute(int);

static int last;
static int report(int error) { if (error) last = error; return error; }

int cudaGetDeviceCount(int* count) { *count = sim_devices(); return 0; }
int cudaGetDevice(int* device) { *device = 0; return 0; }
int cudaSetDevice(int) { return 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int) { *value = sim_attribute(attribute); return 0; }
int cudaGetDeviceProperties(void* properties, int) { std::memset(properties, 0, 256); return 0; }
int cudaMemGetInfo(std::size_t* free, std::size_t* total) { *free = *total = std::size_t(8) << 30; return 0; }
int cudaMalloc(void** memory, std::size_t size) { *memory = sim_allocate(size); return report(*memory ? 0 : 2); }
int cudaFree(void* memory) { return memory == nullptr ? 0 : report(sim_release(memory)); }
int cudaMallocHost(void** memory, std::size_t size) { return report(posix_memalign(memory, 256, size) ? 2 : 0); }
int cudaFreeHost(void* memory) { std::free(memory); return 0; }
int cudaMemcpyAsync(void* to, const void* from, std::size_t size, int, void* stream) {
  sim_memcpy(stream, to, from, size);
  return 0;
}
int cudaMemcpyPeerAsync(void* to, int, const void* from, int, std::size_t size, void* stream) {
  sim_memcpy(stream, to, from, size);
  return 0;
}
int cudaHostRegister(void*, std::size_t, unsigned) { return 0; }
int cudaHostUnregister(void*) { return 0; }
int cudaHostGetDevicePointer(void** device, void* host, unsigned) { *device = host; return 0; }
int cudaStreamCreate(void** stream) { *stream = std::malloc(1); return 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(void* stream) { std::free(stream); return 0; }
int cudaStreamSynchronize(void*) { return 0; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return 0; }
int cudaStreamBeginCapture(void* stream, int) { return report(sim_begin_capture(stream) ? 900 : 0); }
int cudaStreamEndCapture(void*, void** graph) { *graph = sim_end_capture(); return 0; }
int cudaGraphInstantiate(void** executable, void* graph, unsigned long long) {
  *executable = sim_copy_graph(graph);
  return 0;
}
int cudaGraphDestroy(void* graph) { sim_free_graph(graph); return 0; }
int cudaGraphExecDestroy(void* graph) { sim_free_graph(graph); return 0; }
int cudaGraphLaunch(void* graph, void*) { sim_launch_graph(graph); return 0; }
int cudaEventCreate(void** event) { *event = std::malloc(1); return 0; }
int cudaEventDestroy(void* event) { std::free(event); return 0; }
int cudaEventRecord(void*, void*) { return 0; }
int cudaEventSynchronize(void*) { return 0; }
int cudaEventElapsedTime(float* ms, void*, void*) { *ms = 1; return 0; }
int cudaGetLastError() { const int error = last; last = 0; return error; }
int cudaPeekAtLastError() { return last; }
const char* cudaGetErrorName(int) { return "SIMULATED"; }
const char* cudaGetErrorString(int error) { return error == 2 ? "no memory, or memory taken during a capture" : "simulated"; }
}
