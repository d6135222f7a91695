// The part of the CUDA runtime that TVM's calls, over the simulated driver (`driver.cc`).
#include <cstddef>
#include <cstdlib>
#include <cstring>

extern "C" {
void* sim_allocate(std::size_t);
int sim_release(void*);
void sim_memcpy(void*, void*, const void*, std::size_t, bool);
int sim_synchronize(void*);
void* sim_new_event();
void sim_free_event(void*);
int sim_mark(void*, void*);
int sim_wait_event(void*, void*);
int sim_synchronize_event(void*);
int sim_begin_capture(void*);
int sim_end_capture(void*, void**);
void* sim_copy_graph(void*);
void sim_free_graph(void*);
void sim_launch_graph(void*, void*);
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
int cudaMallocHost(void** memory, std::size_t size) {
  const char* most = std::getenv("V4C_SIM_HOST_BYTES");  // of one allocation
  *memory = most && size > std::strtoull(most, nullptr, 10) ? nullptr : sim_allocate(size);
  return report(*memory ? 0 : 2);
}
int cudaFreeHost(void* memory) { return cudaFree(memory); }
int cudaMemcpyAsync(void* to, const void* from, std::size_t size, int kind, void* stream) {
  sim_memcpy(stream, to, from, size, kind == 3);  // cudaMemcpyDeviceToDevice
  return 0;
}
int cudaMemcpyPeerAsync(void* to, int, const void* from, int, std::size_t size, void* stream) {
  sim_memcpy(stream, to, from, size, true);
  return 0;
}
int cudaHostRegister(void*, std::size_t, unsigned) { return 0; }
int cudaHostUnregister(void*) { return 0; }
int cudaHostGetDevicePointer(void** device, void* host, unsigned) { *device = host; return 0; }
int cudaStreamCreate(void** stream) { *stream = std::malloc(1); return 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(void*) { return 0; }  // its address is not used again: work may be left
int cudaStreamSynchronize(void* stream) { return report(sim_synchronize(stream)); }
int cudaStreamWaitEvent(void* stream, void* event, unsigned) { return report(sim_wait_event(stream, event)); }
int cudaStreamBeginCapture(void* stream, int) { return report(sim_begin_capture(stream)); }
int cudaStreamEndCapture(void* stream, void** graph) { return report(sim_end_capture(stream, graph)); }
int cudaGraphInstantiate(void** executable, void* graph, unsigned long long) {
  *executable = sim_copy_graph(graph);
  return 0;
}
int cudaGraphDestroy(void* graph) { sim_free_graph(graph); return 0; }
int cudaGraphExecDestroy(void* graph) { sim_free_graph(graph); return 0; }
int cudaGraphLaunch(void* graph, void* stream) { sim_launch_graph(graph, stream); return 0; }
int cudaEventCreate(void** event) { *event = sim_new_event(); return 0; }
int cudaEventCreateWithFlags(void** event, unsigned) { return cudaEventCreate(event); }
int cudaEventDestroy(void* event) { sim_free_event(event); return 0; }
int cudaEventRecord(void* event, void* stream) { return report(sim_mark(event, stream)); }
int cudaEventSynchronize(void* event) { return report(sim_synchronize_event(event)); }
int cudaEventElapsedTime(float* ms, void*, void*) { *ms = 1; return 0; }
int cudaGetLastError() { const int error = last; last = 0; return error; }
int cudaPeekAtLastError() { return last; }
const char* cudaGetErrorName(int) { return "SIMULATED"; }
const char* cudaGetErrorString(int error) {
  switch (error) {
    case 2: return "no memory, or memory taken during a capture";
    case 900: return "not while the stream is captured";
    case 904: return "a capture ended before another stream was joined";
    case 905: return "a captured stream waits for work outside of the capture";
    case 907: return "an event of a capture that has ended";
    default: return "simulated";
  }
}
}
