// Loaded before all others (LD_PRELOAD): while guard(1) or guard(2) is on, every block of posix_memalign, which torch
// allocates tensors by, and of new in the compiled ops, lies in pages of its own between pages that no one may touch. It ends where they end (1), to the last byte whatever alignment was asked for, or begins
// where they begin (2). A step beyond is SIGSEGV; on the other side, up to the edge of the page, what was written shows
// when the block is freed, and what is read is NaN. Freed pages may not be touched either, until all were used once.
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>

extern "C" void* __libc_memalign(size_t, size_t);
extern "C" void __libc_free(void*);

namespace {

constexpr size_t kPage = 4096, kArena = size_t{16} << 30;
constexpr int kMark = 0xff;  // NaN in every type

// In the page before the first one of a block.
struct Block {
  char* data;
  size_t bytes, pages;
};

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
char* arena = nullptr;
size_t used = 0;
Block* blocks = nullptr;  // of every page of the arena, set for the first page of a block
int mode = 0;
long count = 0;

void stop(const char* message) {
  const size_t length = strlen(message);
  if (write(2, message, length) != static_cast<ssize_t>(length)) abort();
  abort();
}

void* map(size_t bytes, int protection) {
  void* found = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) stop("guard pages: no memory\n");
  return found;
}

uintptr_t code[8][2];
int codes = 0;

// Whether the address lies in code of the compiled ops.
bool ours(const void* address) {
  for (int i = 0; i < codes; ++i)
    if (reinterpret_cast<uintptr_t>(address) - code[i][0] < code[i][1] - code[i][0]) return true;
  return false;
}

bool inside(const void* p) { return arena && p >= arena && p < arena + kArena; }

void* guarded(size_t bytes) {
  if (bytes == 0) bytes = 1;
  pthread_mutex_lock(&lock);
  if (!arena) {
    blocks = static_cast<Block*>(map(kArena / kPage * sizeof(Block), PROT_READ | PROT_WRITE));
    arena = static_cast<char*>(map(kArena, PROT_NONE));
  }
  const size_t pages = (bytes + kPage - 1) / kPage;
  if (used + pages + 2 > kArena / kPage) used = 0;
  size_t first = used + 1;
  // From the second round on, around blocks that are still in use.
  for (size_t i = first; i <= first + pages; ++i)
    if (blocks[i].pages) first = (i += blocks[i].pages) + 1;
  if (first + pages + 1 > kArena / kPage) stop("guard pages: the arena is full\n");
  used = first + pages;
  char* start = arena + first * kPage;
  if (mprotect(start, pages * kPage, PROT_READ | PROT_WRITE)) stop("guard pages: too many mappings\n");
  memset(start, kMark, pages * kPage);
  char* data = mode == 1 ? start + pages * kPage - bytes : start;
  blocks[first] = {data, bytes, pages};
  ++count;
  pthread_mutex_unlock(&lock);
  return data;
}

void release(void* p) {
  const size_t first = static_cast<size_t>(static_cast<char*>(p) - arena) / kPage;
  pthread_mutex_lock(&lock);
  Block& block = blocks[first];
  if (block.data != p) stop("guard pages: freed what is no block\n");
  char* start = arena + first * kPage;
  for (char* c = start; c < start + block.pages * kPage; ++c)
    if ((c < block.data || c >= block.data + block.bytes) && static_cast<unsigned char>(*c) != kMark)
      stop("guard pages: written beside a block\n");
  madvise(start, block.pages * kPage, MADV_DONTNEED);
  mprotect(start, block.pages * kPage, PROT_NONE);
  block = {};
  pthread_mutex_unlock(&lock);
}

}  // namespace

extern "C" {

// 0: off, 1: blocks end at a page that no one may touch, 2: they begin there. Returns the blocks so far.
long guard(int wanted) {
  mode = wanted;
  return count;
}

// Code of the compiled ops: from one address to another.
void guard_code(uintptr_t begin, uintptr_t end) {
  if (codes == 8) stop("guard pages: too many pieces of code\n");
  code[codes][0] = begin;
  code[codes++][1] = end;
}

int posix_memalign(void** result, size_t alignment, size_t bytes) {
  *result = mode ? guarded(bytes) : __libc_memalign(alignment, bytes);
  return *result ? 0 : ENOMEM;
}

void free(void* p) {
  if (inside(p))
    release(p);
  else
    __libc_free(p);
}
}

void* operator new(size_t bytes) {
  return mode && ours(__builtin_return_address(0)) ? guarded(bytes) : __libc_memalign(16, bytes);
}
void operator delete(void* p) noexcept { free(p); }
void operator delete(void* p, size_t) noexcept { free(p); }

void* operator new[](size_t bytes, std::align_val_t alignment) {
  return mode ? guarded(bytes) : __libc_memalign(static_cast<size_t>(alignment), bytes);
}
void operator delete[](void* p, std::align_val_t) noexcept { free(p); }
