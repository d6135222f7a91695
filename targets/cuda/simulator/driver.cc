// A CUDA driver whose device is this processor: what TVM's CUDA runtime and v4c's call of libcuda, and the scheduler.
//
// A block's threads are fibers that run by turns up to their next barrier. Device memory is host memory that starts as
// NaN and ends at a page that may not be touched, and so is page-locked memory. While a stream is being captured,
// launches and copies are recorded and memory cannot be taken, as on a device.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "streams.h"

struct SimIndex { unsigned x, y, z; };
struct SimKernel { void (*call)(void**); int arguments; };

extern "C" {
SimIndex sim_thread, sim_block, sim_block_dim, sim_grid_dim;
unsigned char* sim_shared;
void sim_switch(void** save, void* load);
}

// The registers a function must keep (System V AMD64 ABI, 3.2.1), on the stack; then the other fiber's.
asm(R"(
.text
.type sim_switch, @function
sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace {

constexpr std::size_t STACK = 256 << 10;

struct Copy { void* to; const void* from; int valid; };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  bool done = false;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Barrier { unsigned arrived = 0, expected = 0; unsigned long turn = 0; };

std::vector<Fiber> fibers;
std::vector<Barrier> warps;
std::vector<unsigned char> slots;
Barrier block;
unsigned current, threads, steps_without_progress;
void* scheduler_pointer;
void (*body)(void**);
void** body_arguments;

void die(const char* what) {
  std::fprintf(stderr, "simulated GPU: %s (block %u %u %u, thread %u)\n", what, sim_block.x, sim_block.y, sim_block.z,
               sim_thread.x);
  std::abort();
}

void yield() { sim_switch(&fibers[current].stack_pointer, scheduler_pointer); }

void leave(Barrier& barrier) {
  if (--barrier.expected == barrier.arrived && barrier.arrived > 0) barrier.arrived = 0, ++barrier.turn;
}

void wait(Barrier& barrier) {
  const unsigned long turn = barrier.turn;
  steps_without_progress = 0;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0, ++barrier.turn;
    return;
  }
  while (barrier.turn == turn) yield();
  steps_without_progress = 0;
}

void finish(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) copy.valid ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

void run() {
  body(body_arguments);
  Fiber& fiber = fibers[current];
  fiber.done = true;
  steps_without_progress = 0;
  leave(block);
  leave(warps[current / 32]);
  yield();
  die("a finished thread was resumed");
}

void run_block() {
  block = {0, threads, 0};
  warps.assign((threads + 31) / 32, {});
  for (unsigned w = 0; w < warps.size(); ++w) warps[w].expected = std::min(32u, threads - w * 32);
  slots.assign(threads * 64, 0xff);
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (fiber.stack == nullptr) fiber.stack = static_cast<char*>(std::malloc(STACK));
    void** top = reinterpret_cast<void**>((reinterpret_cast<std::uintptr_t>(fiber.stack + STACK) & ~15ul) - 8);
    *--top = reinterpret_cast<void*>(run);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    fiber.stack_pointer = top;
    fiber.done = false;
    fiber.groups.clear(), fiber.open.clear();
  }
  unsigned left = threads;
  steps_without_progress = 0;
  while (left > 0) {
    for (unsigned n = 0; n < threads; ++n) {
      const unsigned i = backwards ? threads - 1 - n : n;
      if (fibers[i].done) continue;
      current = i;
      sim_thread = {i, 0, 0};
      if (++steps_without_progress > 4 * threads + 8) die("threads wait for a barrier that others never reach");
      sim_switch(&scheduler_pointer, fibers[i].stack_pointer);
      if (fibers[i].done) --left;
    }
  }
}

struct Launch {
  const SimKernel* kernel;
  SimIndex grid, size;
  unsigned shared;
  std::vector<std::uint64_t> values;

  void operator()() {
    std::vector<void*> arguments;
    for (auto& value : values) arguments.push_back(&value);
    body = kernel->call, body_arguments = arguments.data();
    threads = size.x * size.y * size.z;
    if (size.y * size.z != 1 || threads == 0 || threads > 1024) die("expected 1 to 1024 threads along x");
    if (grid.y > 65535 || grid.z > 65535) die("expected at most 65535 blocks along y and z");
    if (shared > 227 << 10) die("expected at most 227 KiB of shared memory");
    std::vector<unsigned char> memory(shared + 128);
    sim_shared = memory.data() + (128 - reinterpret_cast<std::uintptr_t>(memory.data()) % 128) % 128;
    sim_block_dim = size, sim_grid_dim = grid;
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          std::memset(memory.data(), 0xff, memory.size());
          sim_block = {x, y, z};
          run_block();
        }
  }
};

std::map<void*, std::pair<void*, std::size_t>> allocations;

}  // namespace

extern "C" {

void sim_block_barrier() { wait(block); sim_thread = {current, 0, 0}; }
void sim_warp_barrier() { wait(warps[current / 32]); sim_thread = {current, 0, 0}; }
void* sim_lane(int lane) { return &slots[(current / 32 * 32 + static_cast<unsigned>(lane)) % threads * 64]; }
void sim_copy(void* to, const void* from, int valid) { fibers[current].open.push_back({to, from, valid}); }
void sim_commit() {
  Fiber& fiber = fibers[current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
void sim_wait(int left) {
  auto& groups = fibers[current].groups;
  while (groups.size() > static_cast<std::size_t>(left)) finish(groups.front()), groups.erase(groups.begin());
}

// Shared by the two libraries: memory, copies, streams, events and graphs. An int that they return is a cudaError_t.
void* sim_allocate(std::size_t size) {
  if (capture.graph) return nullptr;
  const std::size_t page = 4096, whole = (size + 255) / 256 * 256, mapped = (whole + page - 1) / page * page + page;
  auto* start = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (start == MAP_FAILED) return nullptr;
  mprotect(start + mapped - page, page, PROT_NONE);
  char* memory = start + mapped - page - whole;
  std::memset(memory, 0xff, whole);
  allocations[memory] = {start, mapped};
  return memory;
}
int sim_release(void* memory) {
  timeline.run_all();
  auto found = allocations.find(memory);
  if (found == allocations.end()) return 1;
  munmap(found->second.first, found->second.second);
  allocations.erase(found);
  return 0;
}
void sim_submit(void* stream, Work work) { given_to(stream).add(stream, {std::move(work), {}}); }
void sim_memcpy(void* stream, void* to, const void* from, std::size_t size, bool within_device) {
  if (within_device || recording(stream)) return sim_submit(stream, [=] { std::memmove(to, from, size); });
  timeline.run(timeline.now(stream));  // pageable memory of the host is read or written before the call returns
  std::memmove(to, from, size);
}
int sim_synchronize(void* stream) {
  if (recording(stream)) return 900;
  timeline.run(timeline.now(stream));
  return 0;
}
void* sim_new_event() { return new Event; }
void sim_free_event(void* event) { delete static_cast<Event*>(event); }
int sim_mark(void* event, void* stream) {
  *static_cast<Event*>(event) = {recording(stream) ? capture.number : 0, true, given_to(stream).now(stream)};
  return 0;
}
int sim_wait_event(void* stream, void* handle) {
  const Event& event = *static_cast<Event*>(handle);
  if (!event.marked) return 0;
  if (event.capture == 0) {
    if (recording(stream)) return 905;  // work outside of the graph
    timeline.add(stream, {nullptr, event.point});
    return 0;
  }
  if (!capture.graph || event.capture != capture.number) return 907;  // of a recording that has ended
  capture.streams.insert(stream);
  capture.graph->timeline.add(stream, {nullptr, event.point});
  return 0;
}
int sim_synchronize_event(void* handle) {
  const Event& event = *static_cast<Event*>(handle);
  if (event.capture != 0) return 907;
  timeline.run(event.point);
  return 0;
}
int sim_begin_capture(void* stream) {
  if (capture.graph || stream == nullptr) return 900;  // the default stream cannot be captured
  capture = {std::make_unique<Graph>(Graph{{}, stream}), {stream}, capture.number + 1};
  return 0;
}
int sim_end_capture(void* stream, void** graph) {
  *graph = nullptr;
  if (!recording(stream)) return 900;
  std::unique_ptr<Graph> recorded = std::move(capture.graph);
  if (recorded->origin != stream) return 903;
  if (!recorded->timeline.joined(stream)) return 904;
  *graph = new std::shared_ptr<Graph>(std::move(recorded));
  return 0;
}
void* sim_copy_graph(void* graph) { return new std::shared_ptr<Graph>(*static_cast<std::shared_ptr<Graph>*>(graph)); }
void sim_free_graph(void* graph) { delete static_cast<std::shared_ptr<Graph>*>(graph); }
void sim_launch_graph(void* handle, void* stream) {
  std::shared_ptr<Graph> graph = *static_cast<std::shared_ptr<Graph>*>(handle);
  sim_submit(stream, [graph] {
    Timeline once = graph->timeline;
    once.run(once.now(graph->origin));
  });
}
int sim_devices() { const char* count = std::getenv("V4C_SIM_DEVICES"); return count ? std::atoi(count) : 1; }
int sim_attribute(int attribute) {
  const char* text = std::getenv("V4C_SIM_CAPABILITY");
  const int capability = text ? std::atoi(text) : 90;
  switch (attribute) {
    case 1: return 1024;          // threads per block
    case 8: return 48 << 10;      // shared memory per block
    case 10: return 32;           // warp
    case 16: return 4;            // processors
    case 75: return capability / 10;
    case 76: return capability % 10;
    case 97: return 227 << 10;    // shared memory per block, on request
    default: return 1;
  }
}

int cuInit(unsigned) { return sim_devices() > 0 ? 0 : 100; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGetCount(int* count) { *count = sim_devices(); return 0; }
int cuDeviceGet(int* device, int number) { *device = number; return number < sim_devices() ? 0 : 101; }
int cuDeviceGetAttribute(int* value, int attribute, int) { *value = sim_attribute(attribute); return 0; }
int cuDeviceGetName(char* name, int size, int) { std::snprintf(name, static_cast<std::size_t>(size), "simulated GPU"); return 0; }
int cuGetErrorName(int, const char** name) { *name = "SIMULATED"; return 0; }
int cuGetErrorString(int, const char** text) { *text = "simulated driver"; return 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuTensorMapEncodeTiled() { return 801; }

int cuModuleLoadData(void** module, const void* image) {
  const char* bytes = static_cast<const char*>(image);
  if (std::memcmp(bytes, "V4CSIM01", 8)) return 209;  // no binary for this device
  std::uint64_t size;
  std::memcpy(&size, bytes + 8, 8);
  const int file = memfd_create("kernels", 0);  // stays open: the linker knows a library by its path
  if (file < 0 || write(file, bytes + 16, size) != static_cast<ssize_t>(size)) return 1;
  *module = dlopen(("/proc/self/fd/" + std::to_string(file)).c_str(), RTLD_NOW);
  if (*module == nullptr) std::fprintf(stderr, "simulated GPU: %s\n", dlerror());
  return *module == nullptr ? 200 : 0;
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = dlsym(module, (std::string(name) + "__sim").c_str());
  return *function == nullptr ? 500 : 0;
}

struct CUlaunchConfig {
  unsigned gx, gy, gz, bx, by, bz, shared;
  void* stream;
  void* attributes;
  unsigned count;
};

int cuLaunchKernelEx(const CUlaunchConfig* config, void* function, void** arguments, void**) {
  Launch launch{static_cast<SimKernel*>(function), {config->gx, config->gy, config->gz},
                {config->bx, config->by, config->bz}, config->shared, {}};
  if (config->gx == 0 || config->gy == 0 || config->gz == 0) return 1;
  for (int i = 0; i < launch.kernel->arguments; ++i) {
    std::uint64_t value = 0;
    std::memcpy(&value, arguments[i], 8);
    launch.values.push_back(value);
  }
  sim_submit(config->stream, launch);
  return 0;
}
}
