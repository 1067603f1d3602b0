/* An engine for the tests: its RSA operations run in threads of its own, while their job is paused.
 *
 * A request belongs to the job that waits for it. If the wait context is freed before that, the
 * request is an orphan, and its worker frees it.
 */
#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/async.h>
#include <openssl/engine.h>
#include <openssl/rsa.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { WORKERS = 4, LONGEST = 1024 };

typedef int operation(int, const unsigned char *, unsigned char *, RSA *, int);

struct request {
    struct request *next;
    operation *operation;
    RSA *key;
    int length, padding, result, fd, is_done, is_orphan;
    unsigned char input[LONGEST], output[LONGEST];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct request *first, **last = &first;
static ENGINE *engine;

/* What the tests set and read; under the lock. */
static int is_held, uses_fds = 1, repeats = 1;
static unsigned delay; /* microseconds */
static struct counts { int pauses, in_flight, most_in_flight, finished, orphans, in_place; } counts;

static void destroy(struct request *request)
{
    RSA_free(request->key);
    if (request->fd >= 0)
        close(request->fd);
    free(request);
}

static void finish(struct request *request)
{
    uint64_t one = 1;
    int is_orphan;

    pthread_mutex_lock(&lock);
    request->is_done = 1;
    counts.finished++;
    counts.in_flight--;
    is_orphan = request->is_orphan;
    if (!is_orphan && request->fd >= 0 && write(request->fd, &one, sizeof one) < 0)
        abort();
    pthread_mutex_unlock(&lock);
    if (is_orphan)
        destroy(request);
}

static void *work(void *unused)
{
    struct request *request;
    unsigned microseconds;

    for (;;) {
        pthread_mutex_lock(&lock);
        while (first == NULL || is_held)
            pthread_cond_wait(&changed, &lock);
        request = first;
        first = request->next;
        if (first == NULL)
            last = &first;
        microseconds = delay;
        pthread_mutex_unlock(&lock);
        if (microseconds > 0)
            usleep(microseconds);
        request->result = request->operation(request->length, request->input, request->output,
                                             request->key, request->padding);
        finish(request);
    }
    return unused;
}

/* Called when the wait context is freed and the job will never go on. */
static void clean_up(ASYNC_WAIT_CTX *context, const void *key, OSSL_ASYNC_FD fd, void *data)
{
    struct request *request = data;
    int is_done;

    pthread_mutex_lock(&lock);
    counts.orphans++;
    request->is_orphan = 1;
    is_done = request->is_done;
    pthread_mutex_unlock(&lock);
    if (is_done)
        destroy(request);
}

static void submit(struct request *request)
{
    pthread_mutex_lock(&lock);
    *last = request;
    last = &request->next;
    if (++counts.in_flight > counts.most_in_flight)
        counts.most_in_flight = counts.in_flight;
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
}

/* Pause at least once, even if the request is done by then. */
static void pause_until_done(struct request *request)
{
    int is_done;

    do {
        pthread_mutex_lock(&lock);
        counts.pauses++;
        pthread_mutex_unlock(&lock);
        ASYNC_pause_job();
        pthread_mutex_lock(&lock);
        is_done = request->is_done;
        pthread_mutex_unlock(&lock);
    } while (!is_done);
}

static int run_once(ASYNC_WAIT_CTX *context, operation *operation, int length,
                    const unsigned char *input, unsigned char *output, RSA *key, int padding)
{
    struct request *request = calloc(1, sizeof *request);
    int result;

    if (request == NULL)
        return -1;
    request->operation = operation;
    request->key = key;
    RSA_up_ref(key);
    request->length = length;
    request->padding = padding;
    memcpy(request->input, input, length);
    request->fd = uses_fds ? eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC) : -1;
    if (request->fd >= 0)
        ASYNC_WAIT_CTX_set_wait_fd(context, request, request->fd, request, clean_up);
    submit(request);
    pause_until_done(request);
    if (request->fd >= 0)
        ASYNC_WAIT_CTX_clear_fd(context, request);
    result = request->result;
    if (result > 0)
        memcpy(output, request->output, result);
    destroy(request);
    return result;
}

static int run(operation *operation, int length, const unsigned char *input,
               unsigned char *output, RSA *key, int padding)
{
    ASYNC_JOB *job = ASYNC_get_current_job();
    int i, result = -1;

    if (job == NULL || length > LONGEST || RSA_size(key) > LONGEST) {
        pthread_mutex_lock(&lock);
        counts.in_place++;
        pthread_mutex_unlock(&lock);
        return operation(length, input, output, key, padding);
    }
    for (i = 0; i < repeats; i++)
        result = run_once(ASYNC_get_wait_ctx(job), operation, length, input, output, key, padding);
    return result;
}

static int encrypt(int length, const unsigned char *input, unsigned char *output, RSA *key,
                   int padding)
{
    return run(RSA_meth_get_priv_enc(RSA_PKCS1_OpenSSL()), length, input, output, key, padding);
}

static int decrypt(int length, const unsigned char *input, unsigned char *output, RSA *key,
                   int padding)
{
    return run(RSA_meth_get_priv_dec(RSA_PKCS1_OpenSSL()), length, input, output, key, padding);
}

static int create(void)
{
    RSA_METHOD *method = RSA_meth_dup(RSA_PKCS1_OpenSSL());
    pthread_t thread;
    int i;

    engine = ENGINE_new();
    if (method == NULL || engine == NULL || !RSA_meth_set_priv_enc(method, encrypt)
        || !RSA_meth_set_priv_dec(method, decrypt) || !ENGINE_set_id(engine, "aiojob-tests")
        || !ENGINE_set_name(engine, "aiojob's tests") || !ENGINE_set_RSA(engine, method))
        return 0;
    for (i = 0; i < WORKERS; i++)
        if (pthread_create(&thread, NULL, work, NULL) != 0 || pthread_detach(thread) != 0)
            return 0;
    return 1;
}

/* Have RSA keys that are made from now on use the engine. */
int engine_install(void)
{
    return (engine != NULL || create()) && ENGINE_set_default_RSA(engine);
}

void engine_uninstall(void)
{
    ENGINE_unregister_RSA(engine);
}

void engine_set(int held, int fds, int times, unsigned microseconds)
{
    pthread_mutex_lock(&lock);
    is_held = held;
    uses_fds = fds;
    repeats = times;
    delay = microseconds;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

void engine_counts(struct counts *copy, int reset)
{
    pthread_mutex_lock(&lock);
    *copy = counts;
    if (reset) {
        memset(&counts, 0, sizeof counts);
        counts.in_flight = copy->in_flight;
    }
    pthread_mutex_unlock(&lock);
}
