/* LD_PRELOAD: make one operation that changes files under a directory fail, or end the process there.
 *
 * fault_arm(directory, at, error, stays): number `at` of these operations (from 1; 0 only counts) fails with `error`,
 * or the process is killed where error is 0. With `stays` all later ones fail, too. ENOSPC hits only what needs space.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long fault_at;
static int fault_error, fault_stays;
static atomic_long count;

void fault_arm(const char* directory, long at, int error, int stays) {
  strncpy(root, directory, sizeof root - 1);
  fault_at = at;
  fault_error = error;
  fault_stays = stays;
  count = 0;
}

long fault_count(void) { return count; }

static int is_under(const char* path) { return root[0] != 0 && strncmp(path, root, strlen(root)) == 0; }

static int descriptor_is_under(int descriptor) {
  char link[64], path[PATH_MAX];
  if (root[0] == 0) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return is_under(path);
}

static int path_is_under(int directory, const char* path) {
  return path[0] == '/' || directory == AT_FDCWD ? is_under(path) : descriptor_is_under(directory);
}

static int fails(int under, int needs_space) {
  if (!under) return 0;
  const long number = ++count;
  if (fault_at == 0 || (fault_stays ? number < fault_at : number != fault_at)) return 0;
  if (fault_error == ENOSPC && !needs_space) return 0;
  if (fault_error == 0) raise(SIGKILL);
  errno = fault_error;
  return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define SHIM(type, name, parameters, arguments, under, needs_space) \
  type name parameters {                                            \
    if (fails(under, needs_space)) return -1;                       \
    return REAL(name) arguments;                                    \
  }

SHIM(ssize_t, write, (int fd, const void* data, size_t size), (fd, data, size), descriptor_is_under(fd), 1)
SHIM(ssize_t, pwrite, (int fd, const void* data, size_t size, off_t at), (fd, data, size, at), descriptor_is_under(fd),
     1)
SHIM(ssize_t, pwrite64, (int fd, const void* data, size_t size, off64_t at), (fd, data, size, at),
     descriptor_is_under(fd), 1)
SHIM(ssize_t, writev, (int fd, const struct iovec* data, int pieces), (fd, data, pieces), descriptor_is_under(fd), 1)
SHIM(int, ftruncate, (int fd, off_t size), (fd, size), descriptor_is_under(fd), 1)
SHIM(int, ftruncate64, (int fd, off64_t size), (fd, size), descriptor_is_under(fd), 1)
SHIM(int, fsync, (int fd), (fd), descriptor_is_under(fd), 1)
SHIM(int, fdatasync, (int fd), (fd), descriptor_is_under(fd), 1)
SHIM(int, fchmod, (int fd, mode_t mode), (fd, mode), descriptor_is_under(fd), 0)
SHIM(int, chmod, (const char* path, mode_t mode), (path, mode), is_under(path), 0)
SHIM(int, mkdir, (const char* path, mode_t mode), (path, mode), is_under(path), 1)
SHIM(int, rmdir, (const char* path), (path), is_under(path), 0)
SHIM(int, unlink, (const char* path), (path), is_under(path), 0)
SHIM(int, unlinkat, (int fd, const char* path, int flags), (fd, path, flags), path_is_under(fd, path), 0)
SHIM(int, rename, (const char* from, const char* to), (from, to), is_under(to), 1)
SHIM(int, renameat, (int from_fd, const char* from, int to_fd, const char* to), (from_fd, from, to_fd, to),
     path_is_under(to_fd, to), 1)

#define OPEN(name, first, first_arguments, under)                            \
  int name(first, int flags, ...) {                                          \
    mode_t mode = 0;                                                         \
    if (flags & (O_CREAT | O_TMPFILE)) {                                     \
      va_list rest;                                                          \
      va_start(rest, flags);                                                 \
      mode = va_arg(rest, mode_t);                                           \
      va_end(rest);                                                          \
    }                                                                        \
    const int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); \
    if (fails(writes && under, (flags & O_CREAT) != 0)) return -1;           \
    return REAL(name)(first_arguments, flags, mode);                         \
  }
#define COMMA ,
OPEN(open, const char* path, path, is_under(path))
OPEN(open64, const char* path, path, is_under(path))
OPEN(openat, int fd COMMA const char* path, fd COMMA path, path_is_under(fd, path))
OPEN(openat64, int fd COMMA const char* path, fd COMMA path, path_is_under(fd, path))
