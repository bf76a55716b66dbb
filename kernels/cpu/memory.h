// Memory for gradients and chunks: large, and wanted again with every step.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedkd {

// Grows, never shrinks: page faults on every call cost more than the memory. Begins at a cache
// line.
class Scratch {
 public:
  template <class T> T* at_least(size_t count) {
    const size_t bytes = count * sizeof(T);
    if (bytes > bytes_) {
      memory_.reset();
      bytes_ = (bytes + 4095) / 4096 * 4096;
      memory_.reset(std::aligned_alloc(64, bytes_));
      if (memory_ == nullptr) throw std::bad_alloc();
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t bytes_ = 0;
};

// Fresh memory costs more than the loss: the kernel clears each page when it is first written. So a
// few blocks that are given back are kept for the next call, marked as free: the system may take
// their pages whenever it runs short, and then they are fresh once more. They come in huge pages
// where it has them, 2 MB to a trap.
class Spare {
 public:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };

  static Spare& instance() {
    static Spare& spare = *new Spare;  // never destroyed: tensors may outlive whatever is
    return spare;
  }

  // At least `bytes`, a multiple of a huge page; `data` null when there is no memory.
  Block take(size_t bytes) {
    bytes = (bytes + kHuge - 1) / kHuge * kHuge;
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t best = kept_.size();
    for (size_t i = 0; i < kept_.size(); ++i) {
      const bool fits = kept_[i].bytes >= bytes && kept_[i].bytes <= kLargest * bytes;
      if (fits && (best == kept_.size() || kept_[i].bytes < kept_[best].bytes)) best = i;
    }
    if (best == kept_.size()) {
      drop_oldest();  // sizes have changed: what is kept goes as what is used comes
      void* data = map(bytes);
      for (; data == nullptr && !kept_.empty(); data = map(bytes)) drop_oldest();
      return {data, bytes};
    }
    const Block block = kept_[best];
    kept_.erase(kept_.begin() + best);
    return block;
  }

  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    release(block);
    kept_.push_back(block);
    if (kept_.size() > kBlocks) drop_oldest();
  }

 private:
  static constexpr size_t kHuge = 2 << 20;
  static constexpr size_t kLargest =
      4;  // times what is asked for: the last chunk is shorter than the others

  void drop_oldest() {
    if (kept_.empty()) return;
    unmap(kept_.front());
    kept_.erase(kept_.begin());
  }

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)
  static constexpr size_t kBlocks = 4;  // a gradient, what it is added up in, a chunk of each side
  static void* map(size_t bytes) {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    madvise(data, bytes, MADV_HUGEPAGE);
    return data;
  }
  static void release(Block block) { madvise(block.data, block.bytes, MADV_FREE); }
  static void unmap(Block block) { munmap(block.data, block.bytes); }
#else  // nothing is kept where there is no way to say that it may be taken
  static constexpr size_t kBlocks = 0;
  static void* map(size_t bytes) { return std::aligned_alloc(64, bytes); }
  static void release(Block) {}
  static void unmap(Block block) { std::free(block.data); }
#endif

  std::mutex mutex_;
  std::vector<Block> kept_;
};

}  // namespace fusedkd
