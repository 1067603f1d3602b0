/* An engine of OpenSSL's whose RSA keys are far away: it waits 100 ms for each signature.
 *
 * In an ASYNC_JOB it pauses meanwhile, elsewhere it blocks.
 */
#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/async.h>
#include <openssl/engine.h>
#include <openssl/rsa.h>
#include <stdint.h>
#include <sys/timerfd.h>
#include <unistd.h>

static void clean_up(ASYNC_WAIT_CTX *context, const void *key, OSSL_ASYNC_FD fd, void *data)
{
    close(fd);
}

static int sign(int length, const unsigned char *input, unsigned char *output, RSA *key,
                int padding)
{
    static const char our_key;
    const struct itimerspec time_of_answer = { .it_value.tv_nsec = 100 * 1000 * 1000 };
    ASYNC_JOB *job = ASYNC_get_current_job();
    ASYNC_WAIT_CTX *context = job == NULL ? NULL : ASYNC_get_wait_ctx(job);
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | (job == NULL ? 0 : TFD_NONBLOCK));
    uint64_t answer;

    if (fd < 0 || timerfd_settime(fd, 0, &time_of_answer, NULL) != 0)
        return -1;
    if (job != NULL)
        ASYNC_WAIT_CTX_set_wait_fd(context, &our_key, fd, NULL, clean_up);
    while (read(fd, &answer, sizeof answer) < 0)
        ASYNC_pause_job();
    if (job != NULL)
        ASYNC_WAIT_CTX_clear_fd(context, &our_key);
    close(fd);
    return RSA_meth_get_priv_enc(RSA_PKCS1_OpenSSL())(length, input, output, key, padding);
}

int install(void)
{
    RSA_METHOD *method = RSA_meth_dup(RSA_PKCS1_OpenSSL());
    ENGINE *engine = ENGINE_new();

    return RSA_meth_set_priv_enc(method, sign) && ENGINE_set_id(engine, "remote-key")
        && ENGINE_set_name(engine, "Remote key") && ENGINE_set_RSA(engine, method)
        && ENGINE_set_default_RSA(engine);
}
