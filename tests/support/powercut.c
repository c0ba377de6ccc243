/* Journals what a process does to the files below POWERCUT_ROOT, so that a test can tell what a power cut would have
 * left. To be preloaded; the journal is the file POWERCUT_JOURNAL, outside of the root, and powercut.py reads it.
 *
 * One lock is held over each step and its record, so that the records stand in the order of the steps. A step is
 * recorded before it is taken: what the end of the process cuts off was not synced, and may or may not have happened.
 * Syncs are recorded and not carried out, which makes no difference to a process that is killed.
 *
 * Files are told apart by inode. Mapped memory is not seen: SQLite maps its -shm, which it makes anew after a cut.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct record {
    uint32_t magic;
    uint32_t op;
    uint64_t at_ns;
    uint64_t inode;
    int64_t offset;
    uint64_t length;
} __attribute__((packed));

enum { CREATE = 1, WRITE, TRUNCATE, SYNC, SYNC_FOLDER, RENAME, UNLINK, LINK };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int journal = -1;

__attribute__((constructor)) static void begin(void)
{
    const char *folder = getenv("POWERCUT_ROOT"), *file = getenv("POWERCUT_JOURNAL");
    if (folder == NULL || file == NULL || realpath(folder, root) == NULL)
        return;
    root_length = strlen(root);
    journal = (int)syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
}

/* The real function of this name. */
static void *real(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

#define REAL(type, name, ...)                        \
    static type (*next_##name)(__VA_ARGS__) = NULL;  \
    if (next_##name == NULL)                         \
        *(void **)&next_##name = real(#name)

static void note(int op, uint64_t inode, int64_t offset, const void *data, size_t length)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    struct record record = {0x50435554, (uint32_t)op, (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec,
                            inode, offset, length};
    struct iovec parts[2] = {{&record, sizeof record}, {(void *)data, length}};
    if (syscall(SYS_writev, journal, parts, length ? 2 : 1) != (long)(sizeof record + length))
        abort(); /* a journal with a hole would prove nothing */
}

/* Whether a path lies below the root; `below` gets its name there. */
static int inside(const char *path, const char **below)
{
    if (strncmp(path, root, root_length) != 0 || path[root_length] != '/')
        return 0;
    *below = path + root_length + 1;
    return 1;
}

/* The absolute form of what a caller named; the folder has to exist, the name need not. */
static int resolve(int folder, const char *path, char *out)
{
    char joined[2 * PATH_MAX + 64], parent[PATH_MAX], link[64];
    if (path == NULL)
        return 0;
    if (path[0] == '/' || folder == AT_FDCWD) {
        snprintf(joined, sizeof joined, "%s", path);
    } else {
        char base[PATH_MAX];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0)
            return 0;
        base[length] = 0;
        snprintf(joined, sizeof joined, "%s/%s", base, path);
    }
    char *slash = strrchr(joined, '/');
    const char *name = slash == NULL ? joined : slash + 1;
    if (slash != NULL)
        *slash = 0;
    if (realpath(slash == NULL ? "." : joined[0] ? joined : "/", parent) == NULL)
        return 0;
    return snprintf(out, PATH_MAX, "%s/%s", parent, name) < PATH_MAX;
}

/* What a descriptor is open on: its inode, 0 when it is none of ours. `below` gets a folder's name. */
static uint64_t watched(int fd, char *below, int *is_folder)
{
    char link[64], path[PATH_MAX];
    struct stat found;
    const char *name;
    if (journal < 0 || fd < 0)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    int is_root = strcmp(path, root) == 0;
    if (!is_root && !inside(path, &name))
        return 0;
    if (fstat(fd, &found) != 0)
        return 0;
    if (is_folder != NULL)
        *is_folder = S_ISDIR(found.st_mode);
    if (below != NULL)
        snprintf(below, PATH_MAX, "%s", is_root ? "" : name);
    return S_ISDIR(found.st_mode) || S_ISREG(found.st_mode) ? found.st_ino : 0;
}

/* Before a file is opened: whether that can change it or make it. */
static int opens(int folder, const char *path, int flags, char *full, int *existed)
{
    const char *name;
    struct stat found;
    if (journal < 0 || !(flags & (O_CREAT | O_TRUNC)) || !resolve(folder, path, full) || !inside(full, &name))
        return 0;
    *existed = syscall(SYS_newfstatat, AT_FDCWD, full, &found, 0) == 0;
    return 1;
}

static void opened(int fd, int flags, const char *full, int existed)
{
    struct stat found;
    const char *name;
    if (fd < 0 || fstat(fd, &found) != 0 || !S_ISREG(found.st_mode) || !inside(full, &name))
        return;
    if (!existed)
        note(CREATE, found.st_ino, 0, name, strlen(name));
    else if (flags & O_TRUNC)
        note(TRUNCATE, found.st_ino, 0, NULL, 0);
}

static int do_open(int folder, const char *path, int flags, mode_t mode)
{
    char full[PATH_MAX];
    int existed = 0;
    if (journal < 0)
        return (int)syscall(SYS_openat, folder, path, flags, mode);
    pthread_mutex_lock(&lock);
    int ours = opens(folder, path, flags, full, &existed);
    int fd = (int)syscall(SYS_openat, folder, path, flags, mode);
    int error = errno;
    if (ours)
        opened(fd, flags, full, existed);
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

static mode_t mode_of(int flags, va_list rest)
{
    return flags & (O_CREAT | O_TMPFILE) ? (mode_t)va_arg(rest, int) : 0;
}

#define OPEN(name)                                        \
    int name(const char *path, int flags, ...)            \
    {                                                     \
        va_list rest;                                     \
        va_start(rest, flags);                            \
        mode_t mode = mode_of(flags, rest);               \
        va_end(rest);                                     \
        return do_open(AT_FDCWD, path, flags, mode);      \
    }
#define OPENAT(name)                                      \
    int name(int folder, const char *path, int flags, ...) \
    {                                                     \
        va_list rest;                                     \
        va_start(rest, flags);                            \
        mode_t mode = mode_of(flags, rest);               \
        va_end(rest);                                     \
        return do_open(folder, path, flags, mode);        \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int creat(const char *path, mode_t mode)
{
    return do_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

/* C++ streams come by here, and write by write(2). */
static FILE *do_fopen(const char *path, const char *mode, FILE *(*next)(const char *, const char *))
{
    char full[PATH_MAX];
    int existed = 0, flags = mode[0] == 'w' ? O_CREAT | O_TRUNC : mode[0] == 'a' ? O_CREAT : 0;
    if (journal < 0)
        return next(path, mode);
    pthread_mutex_lock(&lock);
    int ours = opens(AT_FDCWD, path, flags, full, &existed);
    FILE *file = next(path, mode);
    int error = errno;
    if (ours && file != NULL)
        opened(fileno(file), flags, full, existed);
    pthread_mutex_unlock(&lock);
    errno = error;
    return file;
}

FILE *fopen(const char *path, const char *mode)
{
    REAL(FILE *, fopen, const char *, const char *);
    return do_fopen(path, mode, next_fopen);
}

FILE *fopen64(const char *path, const char *mode)
{
    REAL(FILE *, fopen64, const char *, const char *);
    return do_fopen(path, mode, next_fopen64);
}

static ssize_t do_write(int fd, const void *data, size_t length, off_t offset, int at_offset)
{
    pthread_mutex_lock(&lock);
    uint64_t inode = watched(fd, NULL, NULL);
    if (inode != 0) {
        off_t where = offset;
        if (!at_offset) {
            int flags = fcntl(fd, F_GETFL);
            where = lseek(fd, 0, flags & O_APPEND ? SEEK_END : SEEK_CUR);
        }
        note(WRITE, inode, where, data, length);
    }
    ssize_t done = at_offset ? syscall(SYS_pwrite64, fd, data, length, offset) : syscall(SYS_write, fd, data, length);
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

ssize_t write(int fd, const void *data, size_t length)
{
    if (journal < 0 || watched(fd, NULL, NULL) == 0)
        return syscall(SYS_write, fd, data, length);
    return do_write(fd, data, length, 0, 0);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
    return do_write(fd, data, length, offset, 1);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset)
{
    return do_write(fd, data, length, offset, 1);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    ssize_t all = 0;
    if (journal < 0 || watched(fd, NULL, NULL) == 0)
        return syscall(SYS_writev, fd, parts, count);
    for (int number = 0; number < count; number++) {
        ssize_t done = do_write(fd, parts[number].iov_base, parts[number].iov_len, 0, 0);
        if (done < 0)
            return all ? all : done;
        all += done;
        if ((size_t)done < parts[number].iov_len)
            break;
    }
    return all;
}

static int do_ftruncate(int fd, off_t length)
{
    pthread_mutex_lock(&lock);
    uint64_t inode = watched(fd, NULL, NULL);
    if (inode != 0)
        note(TRUNCATE, inode, length, NULL, 0);
    int done = (int)syscall(SYS_ftruncate, fd, length);
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

int ftruncate(int fd, off_t length)
{
    return do_ftruncate(fd, length);
}

int ftruncate64(int fd, off64_t length)
{
    return do_ftruncate(fd, length);
}

static int do_sync(int fd, long call)
{
    char below[PATH_MAX];
    int is_folder = 0;
    pthread_mutex_lock(&lock);
    uint64_t inode = watched(fd, below, &is_folder);
    if (inode != 0)
        note(is_folder ? SYNC_FOLDER : SYNC, inode, 0, below, is_folder ? strlen(below) : 0);
    pthread_mutex_unlock(&lock);
    return inode != 0 ? 0 : (int)syscall(call, fd);
}

int fsync(int fd)
{
    return do_sync(fd, SYS_fsync);
}

int fdatasync(int fd)
{
    return do_sync(fd, SYS_fdatasync);
}

/* A record of two names: "from\0to". */
static void note_names(int op, const char *from, const char *to)
{
    char both[2 * PATH_MAX];
    const char *one = "", *other = "";
    int inside_one = inside(from, &one), inside_other = to != NULL && inside(to, &other);
    if (!inside_one && !inside_other)
        return;
    if (to != NULL && inside_one != inside_other)
        abort(); /* nothing moves into the root or out of it */
    int length = snprintf(both, sizeof both, "%s", one);
    if (to != NULL)
        length += 1 + snprintf(both + length + 1, sizeof both - (size_t)length - 1, "%s", other);
    note(op, 0, 0, both, (size_t)length);
}

static int do_names(int op, int folder, const char *from, int other_folder, const char *to, long call, int flags)
{
    char one[PATH_MAX], other[PATH_MAX];
    if (journal >= 0)
        pthread_mutex_lock(&lock);
    /* Only what will succeed is recorded: the names are checked first, under the lock. */
    int ours = journal >= 0 && resolve(folder, from, one) && (to == NULL || resolve(other_folder, to, other));
    struct stat found;
    if (ours && syscall(SYS_newfstatat, AT_FDCWD, one, &found, AT_SYMLINK_NOFOLLOW) == 0 &&
        !(op == LINK && syscall(SYS_newfstatat, AT_FDCWD, other, &found, AT_SYMLINK_NOFOLLOW) == 0))
        note_names(op, one, to == NULL ? NULL : other);
    int done = to == NULL ? (int)syscall(call, folder, from, flags)
                          : (int)syscall(call, folder, from, other_folder, to, flags);
    int error = errno;
    if (journal >= 0)
        pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

int rename(const char *from, const char *to)
{
    return do_names(RENAME, AT_FDCWD, from, AT_FDCWD, to, SYS_renameat2, 0);
}

int renameat(int folder, const char *from, int other_folder, const char *to)
{
    return do_names(RENAME, folder, from, other_folder, to, SYS_renameat2, 0);
}

int unlink(const char *path)
{
    return do_names(UNLINK, AT_FDCWD, path, AT_FDCWD, NULL, SYS_unlinkat, 0);
}

int unlinkat(int folder, const char *path, int flags)
{
    if (flags & AT_REMOVEDIR)
        return (int)syscall(SYS_unlinkat, folder, path, flags);
    return do_names(UNLINK, folder, path, AT_FDCWD, NULL, SYS_unlinkat, flags);
}

int link(const char *from, const char *to)
{
    return do_names(LINK, AT_FDCWD, from, AT_FDCWD, to, SYS_linkat, 0);
}

int linkat(int folder, const char *from, int other_folder, const char *to, int flags)
{
    return do_names(LINK, folder, from, other_folder, to, SYS_linkat, flags);
}
