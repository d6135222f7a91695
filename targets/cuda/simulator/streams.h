// Streams, events and graphs of the simulated device: when work is run that the host has handed in.
//
// Nothing runs before the host waits for it. A stream then runs alone, what it was given in its order; the work of
// another stream is run when this one comes to an event that stands for it, and no sooner. What is read of another
// stream without waiting for it has then not been written. V4C_SIM_BACKWARDS=1 turns that round: other streams run
// first, as far as they need not wait, so that they read too early what they should have waited for.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>

namespace {

using Work = std::function<void()>;
const bool backwards = std::getenv("V4C_SIM_BACKWARDS") != nullptr;

// Everything that a stream was given before: its first so many items.
struct Point { void* stream = nullptr; std::size_t position = 0; };

// Something to run, or a point of another stream to wait for.
struct Item { Work work; Point after; };

class Timeline {
 public:
  void add(void* stream, Item item) { streams_[stream].left.push_back(std::move(item)); }
  Point now(void* stream) { return {stream, end(stream)}; }
  std::size_t end(void* stream) { return streams_[stream].done + streams_[stream].left.size(); }

  void run(Point point, bool others_first = backwards) {
    Stream& stream = streams_[point.stream];
    while (stream.done < point.position) {
      if (others_first)
        for (auto& other : streams_)
          if (&other.second != &stream) run_ahead(other.second);
      if (stream.done >= point.position) break;
      const std::size_t number = stream.done;
      if (!stream.left.front().work) run(stream.left.front().after, others_first);
      if (stream.done == number) step(stream);
    }
  }

  void run_all() {
    for (auto& stream : streams_) run(now(stream.first));
  }

  // Whether running `origin` to its end runs everything.
  bool joined(void* origin) const {
    Timeline rehearsal = *this;
    for (auto& stream : rehearsal.streams_)
      for (Item& item : stream.second.left)
        if (item.work) item.work = [] {};
    rehearsal.run(rehearsal.now(origin), false);
    for (auto& stream : rehearsal.streams_)
      if (!stream.second.left.empty()) return false;
    return true;
  }

 private:
  struct Stream { std::deque<Item> left; std::size_t done = 0; };
  std::map<void*, Stream> streams_;

  static void step(Stream& stream) {
    Work work = std::move(stream.left.front().work);
    stream.left.pop_front();
    ++stream.done;
    if (work) work();
  }

  void run_ahead(Stream& stream) {
    while (!stream.left.empty()) {
      const Item& item = stream.left.front();
      if (!item.work && streams_[item.after.stream].done < item.after.position) return;
      step(stream);
    }
  }
};

struct Graph { Timeline timeline; void* origin; };

// A recording under way: what its streams are given goes into the graph.
struct Capture {
  std::unique_ptr<Graph> graph;
  std::set<void*> streams;
  unsigned long number = 0;
};

struct Event { unsigned long capture = 0; bool marked = false; Point point; };

Timeline timeline;
Capture capture;

bool recording(void* stream) { return capture.graph && capture.streams.count(stream); }
Timeline& given_to(void* stream) { return recording(stream) ? capture.graph->timeline : timeline; }

}  // namespace
