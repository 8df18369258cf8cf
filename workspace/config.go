package workspace

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	approvals "cal/approval/client"
	"cal/audit"
)

// Config is what the person set in CAL_HOME/config.yaml. Without the file it is zero.
type Config struct {
	Log struct {
		// Witnesses must cosign the log: without them the node begins no effect.
		Witnesses []Witness `yaml:"witnesses"`
	} `yaml:"log"`
	Approvals struct {
		// Notify is a program and its arguments that the authority runs for a new ask.
		Notify []string `yaml:"notify"`
		// Desktop shows a desktop notification for a new ask; nil is true.
		Desktop *bool `yaml:"desktop"`
		// Require is "other-user", "passkey" or empty: no pod starts where that is not so. With
		// "other-user", UID or User, a name of this host's, says which user's approvals must be.
		Require string `yaml:"require"`
		UID     int    `yaml:"uid"`
		User    string `yaml:"user"`
	} `yaml:"approvals"`
}

// Witness is a C2SP tlog-witness.
type Witness struct {
	URL string `yaml:"url"` // submission prefix
	Key string `yaml:"key"` // its cosignature key, in signed-note form
}

// Config reads and checks config.yaml. An unknown key is an error.
func (h Home) Config() (Config, error) {
	name := filepath.Join(h.Dir, "config.yaml")
	var c Config
	raw, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return Config{}, fmt.Errorf("%s: %w", name, err)
	}
	if argv := c.Approvals.Notify; argv != nil {
		// One with a slash that is not absolute would be looked for where the daemon stands.
		if len(argv) == 0 || argv[0] == "" || strings.Contains(argv[0], "/") && !filepath.IsAbs(argv[0]) {
			return Config{}, fmt.Errorf("%s: approvals.notify is %q, want a program, by its name on PATH or its absolute path, and its arguments", name, argv)
		}
	}
	if c.Approvals.Require, err = c.required(); err != nil {
		return Config{}, fmt.Errorf("%s: approvals: %w", name, err)
	}
	for i, w := range c.Log.Witnesses {
		u, err := url.Parse(w.URL)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return Config{}, fmt.Errorf("%s: log.witnesses[%d].url is %q, want an http or https URL", name, i, w.URL)
		}
		if err := audit.CheckWitnessKey(w.Key); err != nil {
			return Config{}, fmt.Errorf("%s: log.witnesses[%d].key: %w", name, i, err)
		}
	}
	return c, nil
}

// required is what approvals.require says, with the user whom approvals.uid or approvals.user name.
func (c Config) required() (string, error) {
	a := c.Approvals
	named := a.User
	if a.UID != 0 {
		named = strconv.Itoa(a.UID)
	}
	switch {
	case a.UID == 0 && a.User == "":
		return requirement(a.Require)
	case a.UID != 0 && a.User != "":
		return "", errors.New("uid and user name the same: leave one out")
	case a.Require != approvals.RequireOtherUser:
		return "", fmt.Errorf("require is %q; uid and user go with %q", a.Require, approvals.RequireOtherUser)
	}
	return requirement(a.Require + ":" + named)
}

// requirement is what is required of approvals, as the node knows it: a user who is named by
// name has a uid. A user that this host does not know is an error.
func requirement(text string) (string, error) {
	kind, name, named := strings.Cut(text, ":")
	if _, err := strconv.Atoi(name); named && kind == approvals.RequireOtherUser && err != nil {
		u, err := user.Lookup(name)
		if err != nil {
			return "", fmt.Errorf("required approvals %q: %w (a uid can be named in place of a user)", text, err)
		}
		text = kind + ":" + u.Uid
	}
	return text, approvals.CheckRequirement(text)
}
