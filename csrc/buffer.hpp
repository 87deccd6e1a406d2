// Uninitialised memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace usf {

// Fetches the memory at an address into the cache, ahead of its use.
inline void prefetch([[maybe_unused]] const void* address) {
#ifdef __GNUC__
    __builtin_prefetch(address);
#endif
}

// Asks for huge pages behind memory that is about to be written. Small ones come one by one as they are first
// written, which takes several times as long as writing. The system may refuse.
inline void use_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#ifdef __linux__
    constexpr std::uintptr_t page = std::uintptr_t{1} << 16;  // or a smaller one: only whole pages are taken
    const auto begin = (reinterpret_cast<std::uintptr_t>(memory) + page - 1) & ~(page - 1);
    const auto end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) & ~(page - 1);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// How often a block is allocated. One that is allocated again and again comes from malloc, which keeps blocks
// of up to 32 MB for the next time: mapping them anew would take longer than filling them.
enum class Allocated { once, again_and_again };

struct FreeMemory {
    std::size_t mapped = 0;  // bytes to unmap, 0 for memory from malloc
    bool borrowed = false;   // somebody else frees it

    void operator()(void* memory) const noexcept {
        if (borrowed) return;
#ifdef __linux__
        if (mapped) {
            munmap(memory, mapped);
            return;
        }
#endif
        std::free(memory);
    }
};
template <class T>
using Memory = std::unique_ptr<T[], FreeMemory>;

constexpr std::size_t large_block = std::size_t{2} << 21;  // bytes: two huge pages
constexpr std::size_t largest_kept = std::size_t{32} << 20;

// Large blocks are mapped, so that their memory goes back to the system as soon as they are freed. They ask
// for huge pages, without which random access spends most of its time on the translation of addresses, too.
template <class T>
Memory<T> allocate(std::size_t n, Allocated allocated = Allocated::once) {
    static_assert(std::is_trivially_copyable_v<T>);
    const std::size_t bytes = n * sizeof(T);
#ifdef __linux__
    if (bytes >= (allocated == Allocated::again_and_again ? largest_kept : large_block)) {
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        use_huge_pages(memory, bytes);
        return Memory<T>(static_cast<T*>(memory), FreeMemory{.mapped = bytes});
    }
#endif
    (void)allocated;
    void* memory = std::malloc(bytes ? bytes : 1);
    if (!memory) throw std::bad_alloc();
    return Memory<T>(static_cast<T*>(memory));
}

// A block that only grows. Memory that is reserved and never written costs address space, not pages, so
// callers reserve the most that they may need.
template <class T>
class Buffer {
public:
    Buffer() = default;
    // There is no assignment or swap, so that borrowed memory stays with the buffer that borrowed it.
    Buffer(Buffer&& other) noexcept
        : data_(std::move(other.data_)), capacity_(std::exchange(other.capacity_, 0)) {}

    T* reserve(std::size_t n) {
        if (n > capacity_) {
            free();  // before allocating: the old contents are not needed
            data_ = allocate<T>(n);
            capacity_ = n;
        }
        return data_.get();
    }
    // Uses the caller's memory, which must outlive the use of this buffer.
    void borrow(T* memory, std::size_t n) {
        data_ = Memory<T>(memory, FreeMemory{.borrowed = true});
        capacity_ = n;
    }
    void free() { release().reset(); }
    Memory<T> release() {
        capacity_ = 0;
        return std::move(data_);
    }
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    T& operator[](std::size_t i) { return data_[i]; }
    const T& operator[](std::size_t i) const { return data_[i]; }

private:
    Memory<T> data_;
    std::size_t capacity_ = 0;
};

}  // namespace usf
