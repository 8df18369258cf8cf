package authority

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"cal/approval"
	"cal/approval/client"
	"cal/nucleus"
)

// ErrNotGranted is the error of a person who did not grant.
var ErrNotGranted = errors.New("not granted")

// Prompt is a terminal with a person at it. There is no other source of a
// passphrase: not standard input, not the environment, not an argument.
//
// Nobody else writes to it meanwhile: a job in the background, which may print what a
// machine says, is stopped when it tries (TOSTOP).
type Prompt struct {
	tty   *os.File
	dumb  bool        // it shows characters and nothing else
	found *term.State // as it was

	// mu is held by who writes; who ends the process keeps it.
	mu    sync.Mutex
	whole bool // the alternate screen is shown
}

const maxLine = 1024

// OpenPrompt opens the process's controlling terminal. One that is not dumb knows ECMA-48.
func OpenPrompt(dumb bool) (*Prompt, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("no terminal to ask a person at: %w", err)
	}
	if !term.IsTerminal(int(tty.Fd())) {
		return nil, errors.Join(errors.New("/dev/tty is no terminal"), tty.Close())
	}
	p := &Prompt{tty: tty, dumb: dumb}
	if p.found, err = term.GetState(int(tty.Fd())); err == nil {
		err = stopOthers(int(tty.Fd()))
	}
	if err != nil {
		return nil, errors.Join(err, tty.Close())
	}
	return p, nil
}

// Close puts the terminal back and closes it.
func (p *Prompt) Close() error {
	return errors.Join(term.Restore(int(p.tty.Fd()), p.found), p.tty.Close())
}

// fresh is an empty screen on which all that is written can be seen; a dumb terminal stays as it is.
func (p *Prompt) fresh() error {
	if p.dumb {
		return nil
	}
	return p.print("%s", "\x1b[?1049l"+cleanModes+clearScreen+"\x1b[?25h")
}

// show puts a text before the person, a screen at a time: no line of it has left the screen
// before a key says that it was seen. below is how many rows what follows takes.
func (p *Prompt) show(text string, below int) error {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	size := p.size()
	room := max(size.height-below, 1)
	if p.dumb {
		room = len(lines)
	}
	for at := 0; ; at += room {
		to := min(at+room, len(lines))
		if err := errors.Join(p.fresh(), p.print("%s\n", strings.Join(lines[at:to], "\n"))); err != nil || to == len(lines) {
			return err
		}
		answer, err := p.question(fmt.Sprintf("lines %d-%d of %d; Enter goes on, q ends: ", at+1, to, len(lines)))
		if err != nil {
			return err
		}
		if answer != "" {
			return fmt.Errorf("%w: it was not read to its end", ErrNotGranted)
		}
	}
}

// Guard returns a function that puts the terminal back as it was, for whoever ends the
// process while a person is asked. After it nothing is written: who would waits for the end.
func (p *Prompt) Guard() (restore func()) {
	return func() {
		p.mu.Lock()
		_ = p.leaveScreen()
		_ = term.Restore(int(p.tty.Fd()), p.found)
	}
}

func (p *Prompt) print(format string, args ...any) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, err := fmt.Fprintf(p.tty, format, args...)
	return err
}

// question asks and reads one line. What was typed ahead does not count.
func (p *Prompt) question(text string) (string, error) {
	if err := errors.Join(dropTyped(int(p.tty.Fd())), p.print("%s", text)); err != nil {
		return "", err
	}
	var line []byte
	for one := make([]byte, 1); len(line) < maxLine; {
		n, err := p.tty.Read(one)
		if err != nil {
			return "", fmt.Errorf("no answer: %w", err)
		}
		if n == 1 && one[0] == '\n' {
			return strings.TrimSpace(string(line)), nil
		}
		line = append(line, one[:n]...)
	}
	return "", fmt.Errorf("the answer is longer than %d bytes", maxLine)
}

// decision is a question about what has just been shown: what is typed before a person can
// have seen it does not count.
func (p *Prompt) decision(text string) (string, error) {
	time.Sleep(grace)
	return p.question(text)
}

func (p *Prompt) passphrase(text string) (string, error) {
	if err := errors.Join(dropTyped(int(p.tty.Fd())), p.print("%s", text)); err != nil {
		return "", err
	}
	typed, err := term.ReadPassword(int(p.tty.Fd()))
	defer clear(typed)
	if err := errors.Join(err, p.print("\n")); err != nil {
		return "", err
	}
	return string(typed), nil
}

// Init asks the person for passphrase and phrase and makes the key.
func (p *Prompt) Init(cfg Config, approver string) (Identity, error) {
	if _, err := ReadApprovers(cfg.Dir); err == nil {
		return Identity{}, fmt.Errorf("there is an approval key in %s; it is not replaced", cfg.Dir)
	} else if !errors.Is(err, ErrNoKey) {
		return Identity{}, err
	}
	if err := p.fresh(); err != nil {
		return Identity{}, err
	}
	if err := p.print("A key for approver %q is made in %s.\n", approver, cfg.Dir); err != nil {
		return Identity{}, err
	}
	phrase, passphrase, err := p.newSecret()
	if err != nil {
		return Identity{}, err
	}
	identity, err := Init(cfg, approver, phrase, passphrase)
	if err != nil {
		return Identity{}, err
	}
	return identity, p.print("The key is made. Approver %s, public key %x\n", identity.Approver, identity.PublicKey)
}

// newSecret asks the person for a phrase and a passphrase of their own.
func (p *Prompt) newSecret() (phrase, passphrase string, err error) {
	if err := p.print("A passphrase seals it; whoever knows it can approve. At least %d characters.\n", MinPassphrase); err != nil {
		return "", "", err
	}
	if passphrase, err = p.passphrase("passphrase: "); err != nil {
		return "", "", err
	}
	if err := checkPassphrase(passphrase); err != nil {
		return "", "", err
	}
	again, err := p.passphrase("passphrase again: ")
	if err != nil {
		return "", "", err
	}
	if passphrase != again {
		return "", "", errors.New("the two passphrases differ")
	}
	if err := p.print("A phrase of your own stands on every screen that asks for the passphrase.\nWhere you do not see it, do not type the passphrase.\n"); err != nil {
		return "", "", err
	}
	phrase, err = p.question("your phrase: ")
	return phrase, passphrase, err
}

// AddApprover lets one who can approve add another: first the one who vouches types the
// passphrase, then the new one chooses phrase and passphrase.
func (p *Prompt) AddApprover(ctx context.Context, c *client.Client, by Key, name string) (nucleus.Approver, error) {
	if err := errors.Join(p.fresh(), p.print("%s adds approver %q, who can then grant alone what needs one approval.\nyour phrase: %s\n", by.Approver, name, approval.Visible(by.Phrase))); err != nil {
		return nucleus.Approver{}, err
	}
	signer, err := p.open(by)
	if err != nil {
		return nucleus.Approver{}, err
	}
	defer signer.Close()
	if err := p.print("Now %q, the new approver.\n", name); err != nil {
		return nucleus.Approver{}, err
	}
	phrase, passphrase, err := p.newSecret()
	if err != nil {
		return nucleus.Approver{}, err
	}
	n, err := signer.NewApprover(name, phrase, passphrase, 0)
	if err != nil {
		return nucleus.Approver{}, err
	}
	made, err := c.AddApprover(ctx, n)
	if err != nil {
		return nucleus.Approver{}, err
	}
	return made, p.print("The key is made. Approver %s, public key %x\nIt can grant for machines that start from now on; those that run know it not.\n", made.Name, made.Key)
}

const passphraseTries = 3

// Approve shows the ask id as its bytes say and grants it if the person wants it
// and knows the passphrase. ErrNotGranted leaves the ask as it was.
//
// A choice makes it a grant for a task, nil one for one use. The bounds of a task are shown, and
// asked for, after the ask.
func (p *Prompt) Approve(ctx context.Context, c *client.Client, key Key, id, reason string, choice *TaskChoice) (client.Status, error) {
	ask, digest, err := c.Get(ctx, id)
	if err != nil {
		return client.Status{}, err
	}
	if err := approval.Check(ask); err != nil {
		return client.Status{}, err
	}
	if err := c.Waits(ctx, id); err != nil { // nothing is asked of the person for nothing
		return client.Status{}, err
	}
	var task *nucleus.Task
	if choice != nil {
		if task, err = p.chooseTask(ctx, c, ask, *choice); err != nil {
			return client.Status{}, err
		}
	}
	if err := p.consent(ask, digest, key.Identity, reason); err != nil {
		return client.Status{}, err
	}
	if task != nil {
		if err := p.consentTask(ask.Action.Op, *task); err != nil {
			return client.Status{}, err
		}
	}
	signer, err := p.openFor(key, "grants "+approval.Summary(ask))
	if err != nil {
		return client.Status{}, err
	}
	token, err := signer.Grant(ask, task, reason)
	signer.Close()
	if err != nil {
		return client.Status{}, err
	}
	status, err := c.Grant(ctx, id, token)
	if err != nil {
		return client.Status{}, err
	}
	until := time.UnixMilli(ask.Expires).UTC().Format("2006-01-02 15:04:05 MST")
	if more := status.Need - len(status.Grants); more > 0 {
		return status, p.print("granted by %s; nothing is done until %d more of %d approvers have granted it, by %s\n", key.Approver, more, status.Need, until)
	}
	if task != nil {
		return status, p.print("granted as a task of %d uses; the first has to come by %s\n", task.Uses, until)
	}
	if ask.Passage != nil {
		return status, p.print("granted; it has to be used by %s, and stands from then on as shown\n", until)
	}
	return status, p.print("granted once, until %s\n", until)
}

// openFor opens the key for a grant, on a screen that says what is granted. A wrong passphrase may be typed again; after the last try the
// person did not grant.
func (p *Prompt) openFor(key Key, what string) (*Signer, error) {
	if err := errors.Join(p.fresh(), p.print("%s\n", what)); err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		if err := p.print("your phrase: %s\n", approval.Visible(key.Phrase)); err != nil {
			return nil, err
		}
		signer, err := p.open(key)
		var wrong *nucleus.Error
		if !errors.As(err, &wrong) || wrong.Kind != nucleus.KindForbidden {
			return signer, err
		}
		if try == passphraseTries {
			return nil, fmt.Errorf("%w: %s", ErrNotGranted, wrong.Message)
		}
		if err := p.print("%s\n", wrong.Message); err != nil {
			return nil, err
		}
	}
}

// open opens a key with the passphrase that the person types.
func (p *Prompt) open(key Key) (*Signer, error) {
	passphrase, err := p.passphrase(fmt.Sprintf("passphrase of %s: ", key.Approver))
	if err != nil {
		return nil, err
	}
	return key.Open(passphrase)
}

// consentTask shows what a task opens beyond the ask and returns nil if the person wants that.
func (p *Prompt) consentTask(op nucleus.Op, task nucleus.Task) error {
	if err := p.show("\n"+approval.DrawTask(op, task, approval.View{Width: p.size().width}), belowConsent); err != nil {
		return err
	}
	answer, err := p.decision("grant all of this? [y/N] ")
	if err == nil && answer != "y" && answer != "Y" && answer != "yes" {
		err = fmt.Errorf("%w: the ask stays open until it expires", ErrNotGranted)
	}
	return err
}

// belowConsent is how many rows a question takes below what it is about, with the reason
// that the person gave.
const belowConsent = 6

// consent shows the ask and returns nil if the person wants to grant it.
func (p *Prompt) consent(ask nucleus.AskRequest, digest string, identity Identity, reason string) error {
	for view := (approval.View{}); ; view.Whole = true {
		size := p.size()
		if !p.dumb && (size.width < leastWidth || size.height < leastHeight) {
			return fmt.Errorf("%w: the terminal has %d columns and %d rows, %d and %d are needed", ErrNotGranted, size.width, size.height, leastWidth, leastHeight)
		}
		view.Width = size.width
		screen, err := approval.Draw(ask, view)
		if err != nil {
			return err
		}
		if screen.Digest != digest {
			return fmt.Errorf("ask %s: drawn from %s, fetched %s", ask.ID, screen.Digest, digest)
		}
		if err := p.show(fmt.Sprintf("\napproval by %s\n\n%s\n", identity.Approver, screen.Text), belowConsent); err != nil {
			return err
		}
		if reason != "" {
			if err := p.print("your reason: %s\n", approval.Visible(reason)); err != nil {
				return err
			}
		}
		text, keys := "grant this once?", "[y/N]"
		if ask.Passage != nil {
			text = "open this passage?"
		}
		if screen.Cut {
			text, keys = "parts are cut; v shows them whole. "+text, "[y/N/v]"
		}
		answer, err := p.decision(text + " " + keys + " ")
		if err != nil {
			return err
		}
		switch {
		case answer == "y" || answer == "Y" || answer == "yes":
			return nil
		case answer == "v" && screen.Cut:
			continue
		}
		return fmt.Errorf("%w: ask %s stays open until it expires; deny refuses it", ErrNotGranted, ask.ID)
	}
}
