package debian

import (
	"os"
	"os/user"
	"strconv"
)

// giveToApt gives a directory to the user as whom root's apt fetches; for an ordinary
// user there is none.
func (a *Apt) giveToApt(dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	fetcher, err := user.Lookup("_apt")
	if err != nil {
		return nil //nolint:nilerr // then apt fetches as root, and says so
	}
	uid, err := strconv.Atoi(fetcher.Uid)
	if err != nil {
		return err
	}
	return os.Chown(dir, uid, -1)
}
