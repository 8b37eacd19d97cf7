# Accounting for slurm.sh, which reads this file: slurmdbd on a MariaDB that only its socket leads to.
# shellcheck shell=bash

# Prints what slurm.conf needs, and writes slurmdbd.conf.
accounting_lines() {
    local port=$1
    # The controller forgets an ended job after MinJobAge seconds; then accounting alone knows it.
    cat <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$port
# Clients reach slurmdbd through this munge, not through that of AuthInfo.
AccountingStoragePass=$root/munge.socket
JobCompType=jobcomp/none
MinJobAge=2
CONF
    (umask 077; cat >"$root/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$root/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$port
SlurmUser=root
LogFile=$root/slurmdbd.log
PidFile=$root/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StoragePass=none
StorageLoc=accounting
CONF
    )
}

up_accounting() {
    alive "$root/database/pid" || up_database
    # It has no option for the socket.
    alive "$root/slurmdbd.pid" || MYSQL_UNIX_PORT=$root/database/socket slurmdbd
    wait_for accounting_answers
    case "$(sacctmgr --noheader list cluster format=cluster)" in
        *modsquad*) ;;
        *) sacctmgr --immediate --quiet add cluster modsquad >/dev/null ;;
    esac
}

up_database() {
    local options=(
        --no-defaults --user=root --datadir="$root/database/data" --skip-networking --skip-log-bin
        --performance-schema=OFF --innodb-log-file-size=8M --innodb-buffer-pool-size=32M
        --innodb-flush-log-at-trx-commit=0 --innodb-data-file-path=ibdata1:8M:autoextend
    )
    local tables=/usr/share/mysql
    mkdir -p "$root/database/data"
    chmod 700 "$root/database"
    # A statement a line is what it reads.
    printf 'create database mysql;\nuse mysql;\n' | cat - "$tables/mysql_system_tables.sql" \
        "$tables/mysql_performance_tables.sql" "$tables/mysql_system_tables_data.sql" |
        mariadbd "${options[@]}" --bootstrap >"$root/mariadb.log" 2>&1
    # Nobody else gets into its folder, so that it need not ask who is there.
    setsid mariadbd "${options[@]}" --skip-grant-tables --socket="$root/database/socket" \
        --pid-file="$root/database/pid" >>"$root/mariadb.log" 2>&1 </dev/null &
    wait_for test -S "$root/database/socket"
    wait_for alive "$root/database/pid"
}

# It says by its text alone that slurmdbd is not there yet.
accounting_answers() {
    local answer
    answer=$(sacctmgr --noheader list cluster 2>&1) || return 1
    case $answer in *error*) return 1 ;; esac
}
