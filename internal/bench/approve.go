package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	approvals "cal/approval/client"
	"cal/authority"
	"cal/internal/keyfile"
	"cal/node/client"
	"cal/nucleus"
	"cal/wire"
)

// approveTimes: from the last key of the passphrase to the effect, and a full queue.
func approveTimes(ctx context.Context, s *stage, rounds int) ([]string, error) {
	lines := []string{
		"## An approval: from Enter behind the passphrase", "",
		"The call waits. Until granted: the program at the terminal opens the key and signs the grant, the authority has verified it, it is durable, and the authority answers. Until done: the node and the machine have verified it, its use and the intent are durable, a file is written, and the caller has the answer.", "",
		"| the key | until granted, ms | until done, ms | between the two, ms |", "|---|---|---|---|",
	}
	for _, key := range []struct {
		name   string
		home   string
		factor int
	}{{"as it is made (scrypt, 2^18)", "d", 0}, {"one that costs nothing to open (2^4)", "e", 4}} {
		granted, done, between, err := s.grants(ctx, filepath.Join(s.dir, key.home), key.factor, rounds)
		if err != nil {
			return nil, err
		}
		lines = append(lines, fmt.Sprintf("| %s | %.1f | %.1f | %.1f |", key.name, median(granted), median(done), median(between)))
	}
	queue, err := s.fullQueue(ctx, rounds)
	return append(lines, queue...), err
}

const benchPassphrase = "correct horse battery staple"

// person is a CAL_HOME with an approval key, a running node and an authority.
func (s *stage) person(ctx context.Context, home string, workFactor int) (*approvals.Client, func(), error) {
	if _, err := authority.Init(authority.Config{Dir: filepath.Join(home, "authority"), WorkFactor: workFactor}, "ann", "blue lamp", benchPassphrase); err != nil {
		return nil, nil, err
	}
	env := append(os.Environ(), "CAL_HOME="+home)
	cal := func(args ...string) error {
		cmd := exec.Command(filepath.Join(s.bin, "cal"), args...)
		cmd.Env, cmd.Dir = env, s.dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("cal %v: %w: %s", args, err, lastLine(string(out)))
		}
		return nil
	}
	if err := cal("node", "start"); err != nil {
		return nil, nil, err
	}
	api := approvals.New(filepath.Join(home, "run", "authority.sock"))
	return api, func() {
		api.Close()
		_ = cal("node", "stop", "--all")
	}, nil
}

func (s *stage) grants(ctx context.Context, home string, workFactor, rounds int) (granted, done, between []float64, err error) {
	fail := func(err error) ([]float64, []float64, []float64, error) { return nil, nil, nil, err }
	api, stop, err := s.person(ctx, home, workFactor)
	if err != nil {
		return fail(err)
	}
	defer stop()
	key, err := keyfile.Load(filepath.Join(home, "keys", "operator.key"))
	if err != nil {
		return fail(err)
	}
	node := client.New(filepath.Join(home, "run", "node.sock"), "operator", key)
	pod, err := node.CreatePod(ctx, nucleus.PodSpec{Mode: nucleus.Mediated, Policy: []byte(`{"operations":{"write_files":"ask"}}`), Image: nucleus.Image{Kind: "host"}})
	if err != nil {
		return fail(err)
	}
	defer node.DeletePod(context.WithoutCancel(ctx), pod.ID)
	for round := range rounds + 1 {
		ended := make(chan error, 1)
		go func() {
			_, err := node.ToolWithin(ctx, pod.ID, nucleus.WriteFiles, map[string]string{"path": fmt.Sprint("f", round), "content": "x"}, time.Minute)
			ended <- err
		}()
		var pending []approvals.Item
		for len(pending) == 0 && ctx.Err() == nil {
			if pending, err = api.List(ctx, approvals.Pending); err != nil {
				return fail(err)
			}
		}
		if ctx.Err() != nil {
			return fail(ctx.Err())
		}
		ms := func(since time.Time) float64 { return float64(time.Since(since).Microseconds()) / 1000 }
		ask, _, err := api.Get(ctx, pending[0].ID)
		if err != nil {
			return fail(err)
		}
		typed := time.Now()
		if err := grant(ctx, api, filepath.Join(home, "authority"), ask); err != nil {
			return fail(err)
		}
		open, answered := ms(typed), time.Now()
		if err := <-ended; err != nil {
			return fail(err)
		}
		if round > 0 {
			granted, done, between = append(granted, open), append(done, ms(typed)), append(between, ms(answered))
		}
	}
	return granted, done, between, nil
}

// grant does what the program at the terminal does once the passphrase is typed.
func grant(ctx context.Context, api *approvals.Client, dir string, ask nucleus.AskRequest) error {
	key, err := authority.ReadKey(dir, "")
	if err != nil {
		return err
	}
	signer, err := key.Open(benchPassphrase)
	if err != nil {
		return err
	}
	defer signer.Close()
	token, err := signer.Grant(ask, nil, "")
	if err != nil {
		return err
	}
	_, err = api.Grant(ctx, ask.ID, token)
	return err
}

// fullQueue lists 1,000 asks that wait.
func (s *stage) fullQueue(ctx context.Context, rounds int) ([]string, error) {
	const asks = 1000
	home := filepath.Join(s.dir, "g")
	api, stop, err := s.person(ctx, home, 4)
	if err != nil {
		return nil, err
	}
	defer stop()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	const each = 20 // a pod has few asks open
	for i := range asks {
		pod := fmt.Sprint("p-bench-", i/each)
		if i%each == 0 {
			if err := api.RegisterPod(ctx, pod, map[string][]byte{"agent": public}); err != nil {
				return nil, err
			}
		}
		ask, err := benchAsk(private, pod, i)
		if err != nil {
			return nil, err
		}
		if _, err := api.Submit(ctx, ask); err != nil {
			return nil, err
		}
	}
	var times []float64
	for range rounds * 5 {
		started := time.Now()
		items, err := api.List(ctx, approvals.Pending)
		if err != nil || len(items) != asks {
			return nil, fmt.Errorf("%d asks are listed, want %d: %w", len(items), asks, err)
		}
		times = append(times, float64(time.Since(started).Microseconds())/1000)
	}
	program := contender{name: "`nucleus-authority list --json`", argv: []string{filepath.Join(s.bin, "nucleus-authority"), "list", "--json"}, env: append(os.Environ(), "CAL_HOME="+home), dir: s.dir}
	medians, err := race(ctx, rounds, program)
	if err != nil {
		return nil, err
	}
	return []string{
		"", "1,000 asks that wait:", "", "| | p50 ms | p99 ms |", "|---|---|---|",
		fmt.Sprintf("| the list, over the socket | %.1f | %.1f |", median(times), quantile(times, 0.99)),
		fmt.Sprintf("| %s, the program's start included | %.1f | |", program.name, medians[0]),
	}, nil
}

// benchAsk is the ask for a command that its requester signed.
func benchAsk(key ed25519.PrivateKey, pod string, i int) (nucleus.AskRequest, error) {
	fail := func(err error) (nucleus.AskRequest, error) { return nucleus.AskRequest{}, err }
	argv := []string{"make", "test", fmt.Sprint("N=", i)}
	args, err := nucleus.Canonical(map[string]any{"argv": argv})
	if err != nil {
		return fail(err)
	}
	signer := wire.Signer{KeyID: "agent", Ed25519: key}
	r, err := signer.NewSignedRequest(http.MethodPost, "http://nucleus/v1/pods/"+pod+"/tools/run_bash", pod, args)
	if err != nil {
		return fail(err)
	}
	r.RequestURI = r.URL.RequestURI() // as a server sees it
	verifier := wire.Verifier{
		Keys: func(string) (wire.Key, bool) {
			return wire.Key{ID: "agent", Ed25519: key.Public().(ed25519.PublicKey)}, true
		},
		Started: time.Now().Add(-time.Minute),
	}
	_, _, signed, err := verifier.Verify(r, "nucleus")
	if err != nil {
		return fail(err)
	}
	salt, now := nucleus.NewSalt(), time.Now().UnixMilli()
	ask := nucleus.AskRequest{
		ID: fmt.Sprint("a-", i), Pod: pod, Workspace: "bench", Session: "s-1", Boot: "b-1", Requester: "agent",
		Action: nucleus.Action{Op: nucleus.RunBash, Args: nucleus.SHA256(args), Command: &nucleus.Command{Argv: argv, Dir: ".", Binary: "/usr/bin/make"}},
		Salt:   salt[:], Policy: nucleus.SHA256([]byte("policy")), Rule: "operations.run_bash", Why: "each time", Tier: "kernel", Mode: "mediated", Approvals: 1,
		Context: nucleus.Context{UnixMilli: now}, Created: now, Expires: now + 600_000, Nonce: fmt.Sprint("n-", i),
	}
	if ask.Digest, err = ask.Action.Digest(salt); err != nil {
		return fail(err)
	}
	ask.Request, err = json.Marshal(signed)
	return ask, err
}
