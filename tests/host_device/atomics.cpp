// What -fsanitize=thread makes of atomic operations in the operators' host code: reference counts.
// With the signature that the compiler gives it.

extern "C" __attribute__((no_sanitize("thread"))) unsigned __tsan_atomic32_fetch_add(
    volatile void* x, unsigned y, int
) {
  return __atomic_fetch_add(static_cast<volatile unsigned*>(x), y, __ATOMIC_SEQ_CST);
}
