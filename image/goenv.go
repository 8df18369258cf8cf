package image

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"

	"cal/internal/durable"
	"cal/internal/fileid"
	"cal/nucleus"
)

// goPlaces is what go says of where its things lie; GOPROXY without secrets.
type goPlaces struct{ GOROOT, GOMODCACHE, GOPROXY string }

// goQuestion asks for them.
var goQuestion = []string{"env", "-json", "GOROOT", "GOMODCACHE", "GOPROXY"}

func (p goPlaces) defaults() string { return filepath.Join(p.GOROOT, "go.env") }

// goVariables are what the answer depends on, beside the files of goAnswer.
var goVariables = []string{"GOROOT", "GOPATH", "GOMODCACHE", "GOENV", "GOPROXY", "XDG_CONFIG_HOME"}

// goAnswer is an answer of go, kept: asking takes longer than all else that a run has
// to find out on the host. Asked is the digest of the question, the program
// and the person's settings included; Defaults is go.env in the answer's GOROOT.
type goAnswer struct {
	Asked    string
	Defaults fileid.ID
	Places   goPlaces
}

// goEnv asks program, or takes its last answer where nothing that it depends on has
// changed since.
func (s *search) goEnv(ctx context.Context, program string) (goPlaces, error) {
	env := []string{"GOTOOLCHAIN=local", "HOME=" + s.person.Home, "PATH=" + s.person.Env["PATH"]}
	for _, name := range goVariables {
		if value := s.person.Env[name]; value != "" {
			env = append(env, name+"="+value)
		}
	}
	settings := s.person.Env["GOENV"]
	if settings == "" {
		config := s.person.Env["XDG_CONFIG_HOME"]
		if config == "" {
			config = filepath.Join(s.person.Home, ".config")
		}
		settings = filepath.Join(config, "go", "env")
	}
	binary, err := fileid.Of(program)
	if err != nil {
		return goPlaces{}, err
	}
	own, err := fileid.Of(settings)
	if err != nil {
		return goPlaces{}, err
	}
	question, err := json.Marshal([]any{env, program, goQuestion, binary, own})
	if err != nil {
		return goPlaces{}, err
	}
	asked := nucleus.SHA256(question)
	kept := filepath.Join(s.person.Scratch, "go-env.json")
	var last goAnswer
	if s.person.Scratch != "" && durable.Load(kept, &last) == nil && last.Asked == asked {
		if now, err := fileid.Of(last.Places.defaults()); err == nil && now == last.Defaults {
			return last.Places, nil
		}
	}
	ask := exec.CommandContext(ctx, program, goQuestion...)
	ask.Dir, ask.Env = "/", env
	output, err := ask.Output()
	if err != nil {
		return goPlaces{}, err
	}
	var answer goPlaces
	if err := json.Unmarshal(output, &answer); err != nil {
		return goPlaces{}, err
	}
	answer.GOPROXY = cleanProxies(answer.GOPROXY)
	if s.person.Scratch != "" {
		defaults, err := fileid.Of(answer.defaults())
		if err != nil {
			return goPlaces{}, err
		}
		if err := os.MkdirAll(s.person.Scratch, 0o700); err != nil {
			return goPlaces{}, err
		}
		if err := durable.Store(kept, goAnswer{asked, defaults, answer}); err != nil {
			return goPlaces{}, err
		}
	}
	return answer, nil
}
