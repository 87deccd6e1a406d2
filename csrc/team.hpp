// Short loops over threads that are there already.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

#ifdef __linux__
#include <dlfcn.h>
#endif

namespace usf {

// PyTorch's OpenMP threads wait actively between its operations. Threads of our own would compete with them
// for the cores, and cost more than loops of less than a millisecond can save. So the runtime that PyTorch
// has loaded is looked up in the process; without it, such loops run on one thread.
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
    std::atomic<std::int64_t> next{0};
    std::exception_ptr failure;
    std::mutex failure_mutex;
    auto run = [&] {
        try {
            for (std::int64_t i; (i = next.fetch_add(1)) < count;) task(i);
        } catch (...) {  // it must not leave the region
            const std::lock_guard<std::mutex> lock(failure_mutex);
            if (!failure) failure = std::current_exception();
            next = count;
        }
    };
    parallel([](void* work) { (*static_cast<decltype(run)*>(work))(); }, &run, static_cast<unsigned>(threads),
             0);
    if (failure) std::rethrow_exception(failure);
}

}  // namespace usf
