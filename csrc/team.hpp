// Short loops over PyTorch's threads.
#pragma once

#include <cstdint>

#include "parallel.hpp"

#ifdef __linux__
#include <dlfcn.h>
#endif

namespace usf {

// PyTorch's OpenMP threads wait actively between its operations. Threads of our own would compete with them
// for the cores, and cost more than loops of less than a millisecond can save. So the runtime that PyTorch
// has loaded is looked up in the process; without it, these loops run on one thread.
using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline ParallelRegion pytorch_parallel_region() {
#ifdef __linux__
    static const auto found = [] {
        void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<ParallelRegion>(dlsym(library, "GOMP_parallel")) : nullptr;
    }();
    return found;
#else
    return nullptr;
#endif
}

// Calls task(i) once for every i in [0, count). Which thread runs which i is not fixed.
template <class Task>
void team_for(std::int64_t count, int threads, Task&& task) {
    const ParallelRegion parallel = threads > 1 && count > 1 ? pytorch_parallel_region() : nullptr;
    if (!parallel) {
        for (std::int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    SharedWork work(count);
    auto run = [&] { work.help(task); };  // exceptions must not leave the region
    parallel([](void* help) { (*static_cast<decltype(run)*>(help))(); }, &run, static_cast<unsigned>(threads),
             0);
    work.rethrow();
}

}  // namespace usf
